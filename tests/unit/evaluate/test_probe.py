import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import KINDS, tiny
from tokar.conf.schema import Probe
from tokar.conf.spine import Data
from tokar.data.prepare import prepare
from tokar.errors import UserError
from tokar.evaluate.probe import fit_head, images_seen, judge_head, linear_probe, rate
from tokar.evaluate.probe_features import generator_features, token_features
from tokar.models.generators.next_token import NextToken

CPU = torch.device("cpu")
SHORT = Probe(epochs=40, warmup_epochs=2, batch_size=20, lr=100.0)


def clusters(count=512, classes=4, seed=0):
    """Features far apart by class, on a scale of their own in every dimension."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(9)) * 8
    return (centres[labels] + torch.randn(count, 12, generator=random)) * torch.logspace(-3, 3, 12), labels


def test_separable_features_are_read_without_a_mistake():
    head = fit_head(lambda epoch: clusters(), 4, SHORT, seed=0, device=CPU)
    numbers = judge_head(head, clusters(seed=1))
    assert numbers["accuracy"] == 1.0
    assert numbers["cross_entropy"] < 0.1


def test_shuffled_labels_are_guessed():
    features, labels = clusters(2048)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    head = fit_head(lambda epoch: (features, shuffled), 4, SHORT, seed=0, device=CPU)
    held_out, labels = clusters(2048, seed=1)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    assert judge_head(head, (held_out, shuffled))["accuracy"] == pytest.approx(0.25, abs=0.05)


def test_top5_is_told_for_ten_classes():
    head = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    head.register_parameter("some", torch.nn.Parameter(torch.zeros(1)))
    logits = torch.arange(10.0).expand(4, 10)
    numbers = judge_head(head, (logits, torch.tensor([9, 5, 4, 0])))
    assert (numbers["accuracy"], numbers["top5_accuracy"]) == (0.25, 0.5)


def test_the_rate_warms_up_and_falls_to_nothing():
    settings = Probe(epochs=10, warmup_epochs=2, batch_size=512, lr=0.1)
    assert [rate(settings, epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    assert rate(Probe(epochs=2, warmup_epochs=10), 1) == pytest.approx(0.05)


def test_the_head_is_a_function_of_the_seed():
    weights = [fit_head(lambda epoch: clusters(), 4, SHORT, seed=seed, device=CPU)[1].weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """Three classes that differ in where a bright bar lies."""
    folder = tmp_path_factory.mktemp("bars")
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for number, name in enumerate("abc"):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[10 * number : 10 * number + 8] += 150
                Image.fromarray(pixels).save(place / f"{i}.png")
    prepare(str(folder), folder / "shards")
    return Data(source="bars", path=str(folder / "shards"), image_size=32, flip=True)


def probed(data, extract, settings=SHORT, **more):
    return linear_probe(extract, data, settings, what={"tokens": "latent"}, device=CPU, batch_size=7, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_every_kind_tell_classes(bars, kind):
    plain, tokenizer = bars.model_copy(update={"flip": False}), tiny(kind)
    result = probed(plain, token_features(tokenizer, "encoder", "concat"), subject={"target": kind})
    assert result.numbers["accuracy"] > (0.9 if kind != "gigatok" else 0.4)  # its queries, with random weights, blur the image
    assert result.subject == {"target": kind, "width": tokenizer.quant_conv.in_channels * 16, "probe_seed": 0}
    assert result.protocol["train"]["images"] == 60
    assert result.protocol["count"] == 24
    assert result.protocol["augmentation"] == {"crop": "center", "flip": False, "views": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "width"), [("latent", 4), ("quantized", 4), ("encoder", None)])
def test_features_are_of_the_tokens_asked_for(kind, tokens, width):
    tokenizer = tiny(kind)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, concat = (token_features(tokenizer, tokens, pool)(image) for pool in ("mean", "concat"))
    width = width or tokenizer.quant_conv.in_channels
    assert mean.shape == (2, width)
    assert concat.shape == (2, width * 16)
    torch.testing.assert_close(concat.view(2, width, 16).mean(2), mean)
    output = tokenizer.encode(image)
    if tokens != "encoder":
        expected = {"latent": output.z_before, "quantized": output.z_quantized}[tokens]
        torch.testing.assert_close(concat, expected.flatten(1))
    assert not tokenizer.quant_conv._forward_pre_hooks


def test_views_are_reused_and_every_image_is_counted(bars):
    seen = []

    def grey(image):
        return image.mean((2, 3))

    settings = SHORT.model_copy(update={"views": 3})
    result = probed(bars, grey, settings, on_image=seen.append)
    assert sum(seen) == images_seen(bars, settings) == 3 * 60 + 24
    assert result.protocol["augmentation"]["views"] == 3
    plain = bars.model_copy(update={"flip": False})
    assert images_seen(plain, SHORT) == 60 + 24
    assert images_seen(plain, SHORT, count=10) == 20


def test_views_are_mirrored_at_random(bars):
    """Features that see left and right: with two views, an image has two."""
    views = []

    def left(image):
        views.append(image)
        return image.flatten(1)

    settings = Probe(epochs=2, warmup_epochs=0, views=2)
    linear_probe(left, bars, settings, what={}, device=CPU, batch_size=60)
    first, second, _ = views
    mirrored = (first != second).flatten(1).any(1)
    assert 0 < mirrored.sum() < 60
    assert torch.equal(first[mirrored], second[mirrored].flip(3))


def test_other_settings_are_another_protocol(bars):
    def grey(image):
        return image.mean((2, 3))

    ids = {probed(bars, grey, Probe(epochs=1, lr=lr)).protocol_id for lr in (0.1, 0.1, 0.2)}
    assert len(ids) == 2
    assert probed(bars, grey, Probe(epochs=1), seed=1).protocol_id in ids


def test_a_generator_is_probed_in_its_middle(bars):
    tokenizer = tiny("vqgan")
    generator = NextToken(16, 3, grid=(4, 4), dim=16, layers=4, heads=2, multiple_of=8).eval()
    image = torch.rand(2, 3, 32, 32)
    features = generator_features(generator, tokenizer)(image)
    assert features.shape == (2, 16)
    generator.transformer.blocks = generator.transformer.blocks[:2]
    generator.transformer.norm = torch.nn.Identity()
    generator.head = torch.nn.Identity()
    hidden = generator.logits(tokenizer.encode(image).codes, torch.tensor([3, 3]))
    torch.testing.assert_close(features, hidden.mean(1))


def test_images_without_classes_are_refused(bars):
    one = bars.model_copy(update={"path": bars.path + "/none"})
    with pytest.raises(UserError, match="no such folder"):
        probed(one, lambda image: image)


def test_encoder_features_need_an_encoder():
    with pytest.raises(UserError, match="has no encoder output"):
        token_features(torch.nn.Identity(), "encoder", "mean")


def test_chance_is_the_start():
    head = fit_head(lambda epoch: clusters(), 4, Probe(epochs=1, warmup_epochs=1, lr=1e-9), seed=0, device=CPU)
    assert judge_head(head, clusters(seed=1))["cross_entropy"] == pytest.approx(math.log(4), abs=0.05)
