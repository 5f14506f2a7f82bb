import argparse

import pytest
import torch
from safetensors.torch import load_file
from tokar.errors import UserError
from tokar.models.build import load_model, save_model
from tokar.models.convert.families import get
from tokar.models.convert.files import convert_file, export_original
from tokar.models.tokenizers.conv import ConvDecoder, ConvEncoder
from tokar.models.tokenizers.quantizers import VectorQuantizer
from tokar.models.tokenizers.vqgan import VQGAN

HALF = {"width": 32, "multipliers": (1, 2), "z_channels": 16}


@pytest.fixture
def original(tmp_path):
    """A training checkpoint in LlamaGen's layout, and the model it came from."""
    torch.manual_seed(0)
    model = VQGAN(ConvEncoder(**HALF), ConvDecoder(**HALF), VectorQuantizer(40, 8), 16).eval()
    theirs = {f"module._orig_mod.{name}": value for name, value in get("llamagen_vq").to_theirs(model.state_dict()).items()}
    file = tmp_path / "vq_ds2.pt"
    torch.save({"model": theirs, "optimizer": {}, "steps": 7, "args": argparse.Namespace(vq_model="VQ-2")}, file)
    return file, model


def test_a_published_file_becomes_a_model_folder(original, tmp_path):
    file, model = original
    report = convert_file(file, tmp_path / "folder", config={"image_size": 16})
    assert (report.family, report.wrapper, report.dropped) == ("llamagen_vq", "model", ["quantize.codebook_used"])
    assert report.tensors == len(model.state_dict())
    assert report.parameters == sum(value.numel() for value in model.state_dict().values())
    assert report.node["encoder"]["multipliers"] == [1, 2]
    loaded = load_model(report.folder)
    assert loaded.layout == model.layout
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(image).reconstruction, model(image).reconstruction)


def test_half_precision_weights_become_float32(original, tmp_path):
    state = torch.load(original[0], weights_only=False)["model"]
    torch.save({name: value.bfloat16() for name, value in state.items()}, tmp_path / "half.pt")
    convert_file(tmp_path / "half.pt", tmp_path / "folder")
    assert {value.dtype for value in load_model(tmp_path / "folder").parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["back.safetensors", "deeper/back.pt"])
def test_a_model_folder_goes_back_bitwise(original, tmp_path, name):
    file, _ = original
    convert_file(file, tmp_path / "folder")
    assert export_original(tmp_path / "folder", tmp_path / name).name == "llamagen_vq"
    written = tmp_path / name
    back = load_file(written) if name.endswith("safetensors") else torch.load(written, weights_only=True)["model"]
    before = torch.load(file, weights_only=False)["model"]
    assert set(back) == {key.removeprefix("module._orig_mod.") for key in before}
    assert all(torch.equal(value, before[f"module._orig_mod.{key}"]) for key, value in back.items())


def test_a_family_that_does_not_fit_is_refused(original, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is not of the family llamagen_vq"):
        convert_file(tmp_path / "a.pt", tmp_path / "folder", family="llamagen_vq")
    with pytest.raises(UserError, match="did you mean 'llamagen_vq'"):
        convert_file(original[0], tmp_path / "folder", family="llamagen-vq")


def test_a_folder_that_does_not_say_its_family_is_refused(original, tmp_path):
    _, model = original
    with pytest.raises(UserError, match=r"no readable config\.json"):
        export_original(tmp_path / "nothing", tmp_path / "a.pt")
    save_model(tmp_path / "trained", {"_target_": "tokar.x.Y"}, model.state_dict())
    with pytest.raises(UserError, match="does not say its family; name it: "):
        export_original(tmp_path / "trained", tmp_path / "a.pt")
    assert export_original(tmp_path / "trained", tmp_path / "a.pt", family="llamagen_vq").name == "llamagen_vq"
