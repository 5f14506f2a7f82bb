"""Open-MAGVIT2 and IBQ as their configs build them; totals and weights are in ../convert/test_seed_voken.py."""

import math

import pytest
import torch
from memory import peak_mib
from tokar.conf.compose import compose
from tokar.models.build import build
from tokar.models.tokenizers.quantizers import entropy, ibq
from tokar.train.clock import Clock
from tokar.train.schedule import factor

RECIPES = {"magvit2_256": 270, "magvit2_128": 350, "ibq_1024": 330, "ibq_8192": 330, "ibq_16384": 330, "ibq_262144": 330}
"""Epochs of each published run."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    path.touch()  # only its place is checked
    return path


def recipe(name, weights):
    return compose("tokenizer", [f"experiment={name}", f"losses.lpips_weights={weights}"]).typed


def tokenizer(name, *overrides):
    config = compose("tokenizer", [f"tokenizer={name}", "data.image_size=32", "loop.duration=1", *overrides])
    torch.manual_seed(0)
    return build(config.typed.tokenizer)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_numbers(name, weights):
    config = recipe(name, weights)
    losses, quantizer = config.losses, config.tokenizer["quantizer"]
    lookup_free = name.startswith("magvit2")
    assert (quantizer["beta"], quantizer["entropy_weight"], quantizer["temperature"]) == (
        0.25,
        0.1 if lookup_free else 0.05,
        0.01,
    )
    assert (losses.reconstruction, losses.perceptual_weight, losses.adversarial_weight) == ("l1", 1.0, 0.1)
    assert (losses.adversarial, losses.adversarial_generator, losses.adversarial_start) == ("hinge", "non_saturating", 0)
    assert losses.lecam_weight == (0.01 if name == "magvit2_128" else 0.05)
    assert not losses.adaptive
    for optim in (config.optim, config.discriminator_optim):
        assert (optim.name, optim.lr, optim.betas, optim.clip, optim.weight_decay) == ("adam", 1e-4, (0.5, 0.9), 0, 0)
    assert (config.ema.decay, config.ema.warmup) == (0.999, False)
    assert (config.loop.batch_size, config.loop.duration) == (256, f"{RECIPES[name]} epochs")


@pytest.mark.parametrize("name", RECIPES)
def test_rates_drop_to_a_tenth_twice(name, weights):
    config, dataset = recipe(name, weights), 1_281_167
    drops = (200, 250) if name == "magvit2_256" else (250, 300)
    total = math.ceil(RECIPES[name] * dataset / 256)

    def rate(epoch):
        step = math.ceil(epoch * dataset / 256)
        return factor(config.schedule, Clock(step, step * 256, total, 256, dataset))

    assert [rate(epoch) for epoch in (0, drops[0] - 0.01)] == [1.0, 1.0]
    assert [rate(epoch) for epoch in (drops[0], drops[1] - 0.01)] == pytest.approx([0.1, 0.1])
    assert [rate(epoch) for epoch in (drops[1], RECIPES[name])] == pytest.approx([0.01, 0.01])


def step(quantizer, z):
    out = quantizer(z)
    (out.latent.sum() + sum(out.losses.values())).backward()


def of_a_gpu(name, images):
    """The quantizer of a recipe in training, and a latent of so many images."""

    def make():
        quantizer = build(compose("tokenizer", [f"tokenizer={name}", "loop.duration=1"]).typed.tokenizer["quantizer"]).train()
        return quantizer, torch.randn(images, quantizer.dim, 16, 16, requires_grad=True)

    return make


@pytest.mark.parametrize(
    ("name", "images", "limit"),
    [("magvit2_256", 8, 32), ("ibq_1024", 4, 32), ("ibq_8192", 4, 256), ("ibq_16384", 4, 448), ("ibq_262144", 4, 1344)],
)
def test_a_gpus_share_of_the_published_batch_fits(name, images, limit):
    """MiB, the codebook's gradient included (256 for 262144 codes). The scores of Open-MAGVIT2's tokens alone are 2 GiB."""
    assert peak_mib(of_a_gpu(name, images), step) < limit


def test_without_pieces_the_largest_codebooks_would_not(monkeypatch):
    whole = 1 << 40
    monkeypatch.setattr(ibq, "CHUNK", whole)
    monkeypatch.setattr(entropy, "CHUNK", whole)
    assert peak_mib(of_a_gpu("ibq_262144", 4), step) > 5 * 1024
    dense = ["tokenizer=magvit2_256", "tokenizer.quantizer.group_bits=18", "loop.duration=1"]

    def make():
        return build(compose("tokenizer", dense).typed.tokenizer["quantizer"]).train(), torch.randn(
            8, 18, 16, 16
        ).requires_grad_()

    assert peak_mib(make, step) > 5 * 1024


SMALL = ["tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,2]", "tokenizer.encoder.blocks=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "own", [["magvit2_256", "tokenizer.quantizer.bits=10"], ["ibq_16384", "tokenizer.quantizer.codebook_size=50"]]
)
def test_training_compiles_to_one_graph(own):
    torch._dynamo.reset()
    name, *overrides = own
    model = tokenizer(name, *overrides, *SMALL).train()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours, plain = compiled(image), model(image)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.losses, plain.losses)
    torch.testing.assert_close(ours.reconstruction, plain.reconstruction)
    gradients = [
        torch.autograd.grad(out.reconstruction.square().mean() + sum(out.losses.values()), list(model.parameters()))
        for out in (ours, plain)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
