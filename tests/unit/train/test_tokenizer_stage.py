import pytest
import torch
from tokar.conf.compose import compose
from tokar.models.tokenizers.losses import generator_loss, reconstruction_loss
from tokar.train.clock import Clock
from tokar.train.tokenizer import LastLayer, TokenizerStage
from torch import nn

SMALL = [
    "loop.duration=10", "data.image_size=16", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]",
    "tokenizer.encoder.blocks=1", "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32",
    "tokenizer.quantizer.codebook_size=16",
    "discriminator.width=8", "discriminator.layers=1", "ema=null",
]  # fmt: skip


def make(workers, *overrides):
    torch.manual_seed(0)
    config = compose("tokenizer", [*SMALL, *overrides]).typed
    stage = TokenizerStage(config)
    return stage, workers.wrap(stage.trainables, None)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"image": torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8), "label": torch.zeros(4, dtype=torch.long)}


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_cut_graph_step_has_the_gradient_of_the_plain_one(workers, batch, adaptive):
    stage, networks = make(workers, f"losses.adaptive={adaptive}", "losses.adversarial_weight=0.3")
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    cut = gradients(stage.tokenizer)

    plain, nets = make(workers, f"losses.adaptive={adaptive}", "losses.adversarial_weight=0.3")
    image = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
    output = plain.tokenizer(image)
    fidelity = reconstruction_loss(output.reconstruction, image, "l2")
    adversarial = 0.3 * generator_loss(nets["discriminator"].module(output.reconstruction), "hinge")
    weight = 1.0
    if adaptive:
        last = plain.tokenizer.last_layer().weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (fidelity, adversarial)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
        torch.testing.assert_close(metrics["adaptive_weight"], weight, rtol=1e-4, atol=1e-6)
    (fidelity + weight * adversarial + sum(output.losses.values())).backward()
    for name, gradient in gradients(plain.tokenizer).items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_discriminator_gets_only_its_own_gradient(workers, batch):
    stage, networks = make(workers, "losses.adversarial_weight=100")
    stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    strong = gradients(networks["discriminator"].module)
    stage, networks = make(workers, "losses.adversarial_weight=0")
    stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    for name, gradient in gradients(networks["discriminator"].module).items():
        assert torch.equal(gradient, strong[name]), name


def test_the_discriminator_rests_before_its_start(workers, batch):
    stage, networks = make(workers, "losses.adversarial_start=6")
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    assert "discriminator" not in metrics
    assert networks["discriminator"].step(1.0) is None
    assert "discriminator" in stage.step(batch, Clock(6, 0, 10, 4, 100), networks)


def test_training_without_a_discriminator(workers, batch):
    stage, networks = make(workers, "discriminator=null")
    assert set(networks) == {"tokenizer"}
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    assert {"loss", "reconstruction", "commitment", "codebook", "codes"} <= set(metrics)


def test_the_loss_falls(workers, batch):
    stage, networks = make(workers)
    losses = []
    for step in range(25):
        losses.append(float(stage.step(batch, Clock(step, 0, 25, 4, 100), networks)["reconstruction"].detach()))
        for network in networks.values():
            network.step(10.0)
    assert losses[-1] < 0.7 * losses[0]


def test_quantizers_without_a_loss_and_with_several_streams(workers, batch):
    for option, streams in (("fsq", 1), ("product", 2)):
        small = [override for override in SMALL if "codebook_size" not in override]
        stage = TokenizerStage(compose("tokenizer", [*small, f"tokenizer/quantizer={option}"]).typed)
        metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), workers.wrap(stage.trainables, None))
        counts = [value.sum().item() for name, value in metrics.items() if name.startswith("codes")]
        assert counts == [stage.tokenizer.layout.streams[0].n_tokens * 4] * streams
        assert all(parameter.grad is not None for parameter in stage.tokenizer.parameters())


def test_the_last_layer_must_be_a_convolution():
    with pytest.raises(ValueError, match=r"not a Conv2d; set losses\.adaptive=false"):
        LastLayer(nn.Linear(3, 3))
