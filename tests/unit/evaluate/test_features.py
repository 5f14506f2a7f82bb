import builtins

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.features import load_features
from tokar.evaluate.inception import FIDInception
from tokar.evaluate.inception_features import resize_tf1
from tokar.evaluate.protocol import file_hash
from tokar.models.build import save_model


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    state = {k: v for k, v in FIDInception().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


def test_inception_resizes_scales_and_states_its_weights(inception_file, images):
    network = load_features("inception", inception_file, sha256=file_hash(inception_file))
    pooled, logits, spatial = network(images[:2])
    pixels = images[:2].permute(0, 3, 1, 2).contiguous().float()
    resized = torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear", align_corners=False)
    expected, _, _ = network.network(resized / 127.5 - 1)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, pooled @ network.network.fc.weight.T)  # the Inception score has no bias
    assert (pooled.shape, logits.shape, spatial.shape) == ((2, 2048), (2, 1008), (2, 2023))
    protocol = network.protocol()
    assert protocol["weights_sha256"] == file_hash(inception_file)
    assert protocol["weights"] == "not the published file"


def test_tensorflow_1_resizes_from_corner_to_corner():
    """One output pixel at a time, by the formula."""
    pixels = torch.rand(1, 2, 5, 7)
    ours, size = resize_tf1(pixels, 11), 11
    for i in range(size):
        for j in range(size):
            (y, x), (a, b) = (i * 5 // size, j * 7 // size), (i * 5 / size % 1, j * 7 / size % 1)
            y1, x1 = min(y + 1, 4), min(x + 1, 6)
            top = pixels[0, :, y, x] * (1 - b) + pixels[0, :, y, x1] * b
            bottom = pixels[0, :, y1, x] * (1 - b) + pixels[0, :, y1, x1] * b
            torch.testing.assert_close(ours[0, :, i, j], top * (1 - a) + bottom * a)
    assert torch.equal(resize_tf1(pixels[..., :5], 5), pixels[..., :5])


def test_the_usual_evaluators_network_resizes_and_scales_its_own_way(inception_file, images):
    network = load_features("inception_tf1", inception_file, sha256=file_hash(inception_file))
    pixels = images[:1].permute(0, 3, 1, 2).float()
    expected = network.network((resize_tf1(pixels, 299) - 128) / 128)
    torch.testing.assert_close(network(images[:1]).spatial, expected[2])
    assert network.protocol()["normalisation"] == "(x - 128) / 128"


def test_inception_refuses_weights_that_do_not_fit(inception_file, tmp_path):
    state = torch.load(inception_file, weights_only=True)
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"is not the published file; .* or say features\.sha256="):
        load_features("inception", tmp_path / "part.pth")
    (tmp_path / "text.pth").write_text("not weights")
    words = {"part.pth": r"missing Mixed_7c\.branch_pool\.conv\.weight", "text.pth": "no readable weights"}
    for name, word in words.items():
        with pytest.raises(UserError, match=word):
            load_features("inception", tmp_path / name, sha256=file_hash(tmp_path / name))
    with pytest.raises(UserError, match="not the file that features"):
        load_features("inception", inception_file, sha256="0" * 64)


def test_dinov2_gives_the_class_token(tmp_path, images):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=28)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    network = load_features("dinov2", tmp_path)
    pooled, logits, _ = network(images[:2])
    resized = torch.nn.functional.interpolate(
        images[:2].permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(resized.clamp(0, 255) / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(pooled, expected)
    assert logits is None
    assert network.protocol()["weights_sha256"] == file_hash(tmp_path / "model.safetensors")


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_clip_gives_projections_of_images_and_captions(tmp_path, size):
    from text_encoders import write_clip_model

    model = write_clip_model(tmp_path)
    network = load_features("clip", tmp_path)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide = size[1] * 224 // 16
    resized = torch.nn.functional.interpolate(pixels.permute(0, 3, 1, 2).float(), (224, wide), mode="bicubic", antialias=True)
    square = resized.clamp(0, 255)[..., (wide - 224) // 2 :][..., :224] / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model((square - mean) / std).pooler_output)
        ids = torch.tensor([[3, 4, 6, 1]])  # a red boat, end
        words = model.text_projection(model.text_model(ids, torch.ones_like(ids)).pooler_output)
    torch.testing.assert_close(network(pixels).pooled, expected)
    torch.testing.assert_close(network.captions(["a red boat"]), words)
    torch.testing.assert_close(network.captions(["a red boat", "dog"])[:1], words)


def test_dinov2_without_transformers_names_the_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(UserError, match=r"pip install 'tokar\[teachers\]'"):
        load_features("dinov2", tmp_path)


def test_classifier_gives_features_and_logits(network, images):
    pooled, logits, _ = network(images)
    expected = network.network.features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(logits, network.network.head(pooled))
    assert pooled.shape[1] == network.dim


def test_classifier_refuses_another_size(network):
    with pytest.raises(UserError, match="judges 16x16 images, got 32x32"):
        network(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_classifier_folder_must_hold_a_classifier(tmp_path):
    save_model(tmp_path, {"_target_": "tokar.evaluate.inception.InceptionB", "channels": 1}, _state_of_block_b())
    with pytest.raises(UserError, match="holds a InceptionB, no classifier"):
        load_features("classifier", tmp_path)


def _state_of_block_b():
    from tokar.evaluate.inception import InceptionB

    return InceptionB(1).state_dict()


@pytest.mark.parametrize(
    ("name", "path", "word"),
    [
        ("incepton", "x", "did you mean 'inception'"),
        ("inception", None, "need weights"),
        ("inception", "nowhere.pth", "nowhere.pth"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, path, word):
    with pytest.raises(UserError, match=word):
        load_features(name, path)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_only_uint8_images_are_judged(network, wrong):
    with pytest.raises(UserError, match="want uint8"):
        network(wrong)
