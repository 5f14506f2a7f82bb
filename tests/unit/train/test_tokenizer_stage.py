import pytest
import torch
from frozen_models import SIZES, save_random
from tokar.conf.compose import compose
from tokar.errors import ConfigError
from tokar.models.build import load_model
from tokar.models.tokenizers.losses import (
    ConvNextPerceptual,
    LeCam,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
)
from tokar.train import checkpoint
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
    adversarial = generator_loss(nets["discriminator"].module(output.reconstruction), "hinge")
    weight = 1.0
    if adaptive:
        last = plain.tokenizer.last_layer().weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (fidelity, adversarial)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
        torch.testing.assert_close(metrics["adaptive_weight"], weight, rtol=1e-4, atol=1e-6)
    (fidelity + 0.3 * weight * adversarial + sum(output.losses.values())).backward()
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


def test_the_adversarial_weight_warms_up(workers, batch):
    stage, networks = make(
        workers, "losses.adversarial_start=4", "losses.adversarial_warmup=4", "losses.adversarial_weight=0.3"
    )
    adversarial = {}
    for step in (4, 5, 8, 9):
        metrics = stage.step(batch, Clock(step, 0, 10, 4, 100), networks)
        adversarial[step] = float(metrics["adversarial"] / metrics["logits_fake"].detach())
    assert adversarial == pytest.approx({4: 0.0, 5: -0.3 / 4, 8: -0.3, 9: -0.3}, rel=1e-3)


def test_the_generator_may_have_a_loss_of_its_own(workers, batch):
    options = ["losses.adversarial_generator=non_saturating", "losses.adversarial_weight=0.3"]
    stage, networks = make(workers, *options)
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    plain, nets = make(workers, *options)
    image = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
    judge = nets["discriminator"].module
    real, fake = judge(image), judge(plain.tokenizer(image).reconstruction)
    torch.testing.assert_close(metrics["adversarial"], 0.3 * nn.functional.softplus(-fake).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["discriminator"], discriminator_loss(real, fake, "hinge"), rtol=1e-4, atol=1e-6)


def test_regularised_discriminator_has_the_gradient_of_the_sum(workers, batch):
    """Hinge, LeCam and R1 of every second step, twice as heavy there, against the plain formulas."""
    options = ["losses.lecam_weight=0.4", "losses.lecam_decay=0.9", "losses.r1_weight=0.2", "losses.r1_every=2"]
    stage, networks = make(workers, *options)
    stage.step(batch, Clock(6, 0, 10, 4, 100), networks)
    given = gradients(networks["discriminator"].module.discriminator)

    plain, nets = make(workers, *options)
    judge = nets["discriminator"].module.discriminator
    image = (batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1).requires_grad_()
    real, fake = judge(image), judge(plain.tokenizer(image).reconstruction.detach())
    loss = discriminator_loss(real, fake) + 0.4 * LeCam(0.9)(real, fake) + 2 * 0.2 * r1_penalty(real, image)
    loss.backward()
    for name, gradient in gradients(judge).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_r1_is_taken_at_every_so_many_steps(workers, batch):
    stage, networks = make(workers, "losses.r1_weight=0.2", "losses.r1_every=3")
    taken = [step for step in range(7) if "r1" in stage.step(batch, Clock(step, 0, 10, 4, 100), networks)]
    assert taken == [0, 3, 6]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dino")
    save_random("ViTModel", folder, **SIZES, patch_size=8, image_size=16)
    return [
        f"discriminator.path={folder}", "discriminator=dino", "discriminator.size=16", "+discriminator.layers=[0,1,2]",
        "+discriminator.kernel=3",
    ]  # fmt: skip


def test_r1_through_a_frozen_transformer(workers, batch, dino):
    small = [override for override in SMALL if not override.startswith("discriminator")]
    stage = TokenizerStage(compose("tokenizer", [*small, *dino, "losses.r1_weight=0.2"]).typed)
    networks = workers.wrap(stage.trainables, None)
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    assert metrics["r1"] > 0
    assert all(
        value.grad is not None and value.grad.isfinite().all() for value in networks["discriminator"].module.parameters()
    )


def test_r1_beside_a_compiled_discriminator(workers, batch):
    taken = []
    for compiled in (True, False):
        stage, networks = make(workers, "losses.r1_weight=0.2")
        if compiled:
            networks["discriminator"].module.compile(backend="aot_eager")
        taken.append(stage.step(batch, Clock(5, 0, 10, 4, 100), networks)["r1"])
    torch.testing.assert_close(*taken)


REGULARISED = ["losses.lecam_weight=0.4", "losses.lecam_decay=0.9", "losses.r1_weight=0.2", "losses.r1_every=2"]


def _saved(folder, workers, networks):
    store = checkpoint.Checkpoints(folder, workers, background=False)
    store.save(networks, {}, {"step": 3, "world": 1})
    return store.newest(pytest.fail)


def test_a_regularised_run_goes_on_bitwise_from_its_checkpoint(workers, batch, tmp_path):
    def train(stage, networks, steps):
        for step in steps:
            stage.step(batch, Clock(step, 0, 10, 4, 100), networks)
            for network in networks.values():
                network.step(1.0)

    stage, networks = make(workers, *REGULARISED)
    train(stage, networks, range(3))
    saved = _saved(tmp_path, workers, networks)
    train(stage, networks, range(3, 6))
    resumed, others = make(workers, *REGULARISED)
    checkpoint.restore(saved, others, workers)
    assert others["discriminator"].module.lecam.real != 0
    train(resumed, others, range(3, 6))
    for name, network in networks.items():
        state = others[name].module.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in network.module.state_dict().items())
    opened = load_model(saved.path / "discriminator")
    assert opened.lecam.decay == 0.9


def test_lecam_leaves_the_discriminator_as_it_is_without_it(workers):
    _, networks = make(workers)
    assert not [name for name in networks["discriminator"].module.state_dict() if "lecam" in name]


def test_convnext_is_a_loss_of_reconstruction_and_shortcut(workers, batch, tmp_path):
    pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "image_size": 16, "num_labels": 5}
    save_random("ConvNextForImageClassification", tmp_path, **sizes)
    stage, networks = make(workers, "losses.convnext_weight=0.1", f"losses.convnext_path={tmp_path}")
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), networks)
    image = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    distance = ConvNextPerceptual(str(tmp_path))(stage.tokenizer(image).reconstruction, image).mean()
    torch.testing.assert_close(metrics["convnext"].detach(), 0.1 * distance.detach(), rtol=1e-4, atol=1e-6)
    assert [type(module) for module in stage.frozen] == [ConvNextPerceptual]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["losses.convnext_weight=0.1"], "losses.convnext_path: missing; give a folder or hub id"),
        (["losses.lecam_weight=0.1", "discriminator=null"], "losses.lecam_weight: there is no discriminator; set losses.lecam"),
        (["losses.r1_weight=0.1", "discriminator=null"], "losses.r1_weight: there is no discriminator"),
    ],
)
def test_losses_without_what_they_need_are_refused(overrides, line):
    small = [override for override in SMALL if "discriminator=null" not in overrides or "discriminator" not in override]
    with pytest.raises(ConfigError, match=line):
        compose("tokenizer", [*small, "data=digits", *overrides])


def test_scales_are_counted_alone_and_together(workers, batch):
    small = [override for override in SMALL if "tokenizer." not in override]
    own = ["tokenizer=multiscale_small", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]",
           "tokenizer.quantizer.scales=[1,2,8]", "tokenizer.quantizer.codebook_size=16"]  # fmt: skip
    stage = TokenizerStage(compose("tokenizer", [*small, *own]).typed)
    metrics = stage.step(batch, Clock(5, 0, 10, 4, 100), workers.wrap(stage.trainables, None))
    counts = {name: value for name, value in metrics.items() if name.startswith("codes")}
    assert {name: value.sum().item() for name, value in counts.items()} == {
        "codes_scale0": 4, "codes_scale1": 16, "codes_scale2": 256, "codes": 276,
    }  # fmt: skip
    assert torch.equal(counts["codes"], sum(counts[f"codes_scale{k}"] for k in range(3)))


def test_the_last_layer_must_be_a_convolution():
    with pytest.raises(ValueError, match=r"not a Conv2d; set losses\.adaptive=false"):
        LastLayer(nn.Linear(3, 3))
