import builtins
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from frozen_models import SIZES, save_random
from tokar.conf.signature import check_components
from tokar.errors import UserError
from tokar.models.build import build, load_model, save_model
from tokar.models.classifier import Classifier
from tokar.models.tokenizers.semantic import ProjectionHead
from tokar.models.tokenizers.teachers import (
    ClassifierTeacher,
    ClipTeacher,
    DinoV2Teacher,
    Siglip2Teacher,
    resample_tokens,
    semantic_loss,
)

pytest.importorskip("transformers")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SYMMETRIC = ([0.5] * 3, [0.5] * 3)
CLASSIFIER = {"_target_": "tokar.models.classifier.Classifier", "image_size": 32, "num_classes": 10, "width": 8}
TEXT = {**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def vit(kind, folder, patch=14, image=28, **more):
    return save_random(kind, folder, **SIZES, patch_size=patch, image_size=image, **more)


def pixels_for(statistics, image, size):
    """What a user of the published model would do by hand."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    resized = F.interpolate((image + 1) / 2, (size, size), mode="bicubic") if image.shape[-1] != size else (image + 1) / 2
    return (resized - mean) / std


@pytest.fixture
def image():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    model = Classifier(32, 10, width=8).eval()
    save_model(tmp_path / "classifier", CLASSIFIER, model.state_dict())
    return model


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2_gives_patch_tokens_without_class_token_and_registers(tmp_path, image, registers):
    kind, more = ("Dinov2WithRegistersModel", {"num_register_tokens": 3}) if registers else ("Dinov2Model", {})
    model = vit(kind, tmp_path, **more)
    teacher = DinoV2Teacher(str(tmp_path), size=56)
    with torch.no_grad():
        hidden = model(pixel_values=pixels_for(IMAGENET, image, 56)).last_hidden_state
    torch.testing.assert_close(teacher.features(image), hidden[:, 1 + registers :])
    assert (teacher.dim, teacher.grid, hidden.shape[1]) == (16, (4, 4), 17 + registers)


def test_dinov2_has_256_tokens_at_its_size(tmp_path):
    vit("Dinov2Model", tmp_path)
    teacher = DinoV2Teacher(str(tmp_path))
    assert teacher.grid == (16, 16)
    assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 16)


@pytest.mark.parametrize("size", [None, 48])
def test_siglip_gives_every_token(tmp_path, image, size):
    model = vit("SiglipVisionModel", tmp_path, patch=16, image=32)
    teacher = Siglip2Teacher(str(tmp_path), size)
    with torch.no_grad():
        pixels = pixels_for(SYMMETRIC, image, size or 32)
        expected = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(teacher(image), expected)
    assert expected.shape[1] == teacher.grid[0] * teacher.grid[1]


def test_clip_gives_patch_tokens_after_the_last_norm(tmp_path, image):
    model = vit("CLIPVisionModel", tmp_path)
    teacher = ClipTeacher(str(tmp_path))
    with torch.no_grad():
        answer = model(pixel_values=pixels_for(CLIP, image, 28))
        norm = model.post_layernorm
        expected = F.layer_norm(answer.last_hidden_state, (16,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(answer.pooler_output, expected[:, 0])  # the norm that makes the published image embedding
    torch.testing.assert_close(teacher(image), expected[:, 1:])


@pytest.mark.parametrize(("kind", "teacher"), [("CLIPModel", ClipTeacher), ("SiglipModel", Siglip2Teacher)])
def test_the_image_half_of_a_full_model_is_read(tmp_path, image, kind, teacher):
    model = save_random(kind, tmp_path, text_config=TEXT, vision_config={**SIZES, "patch_size": 14, "image_size": 28})
    made = teacher(str(tmp_path))
    own = dict(model.vision_model.named_parameters())
    read = {name.removeprefix("vision_model."): value for name, value in made.frozen.named_parameters()}
    assert read.keys() == own.keys()
    assert all(torch.equal(read[name], own[name]) for name in own)


def test_the_classifier_gives_its_map_before_the_mean(tmp_path, classifier, image):
    teacher = ClassifierTeacher(str(tmp_path / "classifier"))
    tokens = teacher(image)
    assert (tokens.shape, teacher.dim, teacher.grid) == ((2, 16, classifier.feature_dim), classifier.feature_dim, (4, 4))
    torch.testing.assert_close(tokens.mean(1), classifier.features(image))
    torch.testing.assert_close(tokens[:, 5], classifier.blocks(image)[:, :, 1, 1])
    larger = F.interpolate(image, (64, 64), mode="nearest")
    torch.testing.assert_close(teacher(larger), teacher(F.interpolate(larger, (32, 32), mode="bicubic")))


@pytest.mark.parametrize("size", [20, 36, 64])
def test_the_classifiers_grid_is_that_of_its_map(tmp_path, size):
    model = Classifier(size, 10, width=8)
    save_model(tmp_path, CLASSIFIER | {"image_size": size}, model.state_dict())
    teacher = ClassifierTeacher(str(tmp_path))
    assert teacher(torch.zeros(1, 3, size, size)).shape[1] == teacher.grid[0] * teacher.grid[1]


def test_a_teacher_is_frozen_and_no_part_of_what_is_saved_or_optimised(tmp_path, classifier, image):
    teacher = ClassifierTeacher(str(tmp_path / "classifier"))
    image.requires_grad_(True)
    before = teacher(image)
    assert not before.requires_grad
    teacher.train().requires_grad_(True)
    torch.testing.assert_close(teacher(image), before)
    assert not any(value.requires_grad for value in teacher.frozen.parameters())
    assert not list(teacher.parameters())
    assert not teacher.state_dict()
    head = ProjectionHead(6, teacher.dim)
    semantic_loss(head(torch.randn(2, 16, 6)), teacher(image)).backward()
    assert image.grad is None
    assert all(value.grad is not None for value in head.parameters())


def test_a_teacher_moves_with_its_module(tmp_path, classifier):
    teacher = ClassifierTeacher(str(tmp_path / "classifier"))
    assert teacher.double() is teacher
    assert {value.dtype for value in teacher.frozen.parameters()} == {torch.float64}


def test_a_teacher_has_its_weights_where_the_rest_is_built_without_memory(tmp_path, image):
    vit("Dinov2Model", tmp_path)
    with torch.device("meta"):
        teacher = DinoV2Teacher(str(tmp_path), size=28)
    assert teacher(image).abs().sum() > 0


def test_semantic_loss_by_hand():
    ours = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [-1.0, 0.0]]])
    theirs = torch.tensor([[[5.0, 0.0], [3.0, 4.0]], [[-3.0, -4.0], [0.0, 1.0]]])
    torch.testing.assert_close(semantic_loss(ours, theirs), torch.tensor(1 - (1 + 0.8 - 1 + 0) / 4))
    torch.testing.assert_close(semantic_loss(ours.bfloat16(), theirs), semantic_loss(ours, theirs))


def test_following_the_gradient_reaches_the_teacher():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8)
    optimizer = torch.optim.Adam([ours], 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        semantic_loss(ours, theirs).backward()
        optimizer.step()
    assert semantic_loss(ours, theirs) < 1e-3


def test_a_grid_of_another_size_is_resampled_in_place():
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    columns = rows.T
    tokens = torch.stack([rows, columns], dim=-1).reshape(1, 16, 2)
    halved = resample_tokens(tokens, 4)
    low = (0 * 3 + 1 * 3 + 2 * 1) / 7  # a triangle of weights 1, 3, 3, 1, cut off at the border
    torch.testing.assert_close(halved[0, :, 0], torch.tensor([low, low, 3 - low, 3 - low]))
    torch.testing.assert_close(halved[0, :, 1], torch.tensor([low, 3 - low, low, 3 - low]))
    assert resample_tokens(tokens, 16) is tokens
    torch.testing.assert_close(resample_tokens(tokens, 64).mean(1), tokens.mean(1))


def test_features_that_cannot_be_compared_are_one_line():
    with pytest.raises(UserError) as refusal:
        semantic_loss(torch.zeros(1, 4, 8), torch.zeros(1, 4, 6))
    assert str(refusal.value) == (
        "tokenizer.semantic.dim: the tokenizer projects to width 8, the teacher's features have width 6; "
        "set tokenizer.semantic.dim=6"
    )
    with pytest.raises(UserError, match=r"has 12 semantic features, the teacher 16: no square grids"):
        semantic_loss(torch.zeros(1, 12, 8), torch.zeros(1, 16, 8))


def test_what_is_no_teacher_is_refused(tmp_path, monkeypatch):
    vit("CLIPVisionModel", tmp_path / "clip")
    with pytest.raises(UserError, match="holds a model of type 'clip_vision_model', not DINOv2"):
        DinoV2Teacher(str(tmp_path / "clip"))
    with pytest.raises(UserError, match="no such folder; give path a folder that save_pretrained of Dinov2Model or"):
        DinoV2Teacher(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable CLIP model there"):
        ClipTeacher(str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing: no readable CLIP model there"):
        ClipTeacher("nobody/nothing")


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    vit("Dinov2Model", tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["layernorm.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of DINOv2, first layernorm\.bias"):
        DinoV2Teacher(str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="no readable DINOv2 model there"):
        DinoV2Teacher(str(tmp_path))


def test_a_size_between_patches_is_refused(tmp_path):
    vit("Dinov2Model", tmp_path)
    with pytest.raises(UserError, match="size 30 is no multiple of the teacher's patch 14; use 28"):
        build({"_target_": "tokar.models.tokenizers.teachers.DinoV2Teacher", "path": str(tmp_path), "size": 30})


def test_only_a_classifier_teaches_as_one(tmp_path):
    node = {"_target_": "tokar.models.tokenizers.semantic.ProjectionHead", "width": 2, "dim": 3}
    save_model(tmp_path, node, ProjectionHead(2, 3).state_dict())
    assert isinstance(load_model(tmp_path), ProjectionHead)
    with pytest.raises(UserError, match="holds a ProjectionHead, no classifier"):
        ClassifierTeacher(str(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        ClassifierTeacher(str(tmp_path / "nowhere"))


def test_without_transformers_the_command_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(UserError, match=r"DINOv2 needs transformers; pip install 'tokar\[teachers\]'"):
        DinoV2Teacher(str(tmp_path))


def options(root: Path, group: str):
    from omegaconf import OmegaConf

    return {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in (root / "conf" / group).glob("*.yaml")}


def test_every_teacher_of_the_configs_is_one(root):
    found = options(root, "teacher")
    assert set(found) == {"dinov2_b", "dinov2_s", "siglip2_b", "clip_l", "classifier"}
    for name, node in found.items():
        assert node["path"] == "???", f"{name} needs a path"
        assert not list(check_components(node | {"path": "somewhere"}))
