import pytest
import torch
import torch.nn.functional as F
from lpips_weights import CONVOLUTIONS, STAGE_ENDS, random_lpips
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.tokenizers.losses import (
    LPIPS,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)


def test_reconstruction():
    a, b = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])
    assert reconstruction_loss(a, b, "l1") == 2.0
    assert reconstruction_loss(a, b, "l2") == 5.0


def test_hinge_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * (2.5 / 3 + 3.0 / 3)))
    torch.testing.assert_close(generator_loss(fake + 1), torch.tensor(-2 / 3))


def test_non_saturating_is_cross_entropy_with_labels_in_place():
    real, fake = torch.randn(5), torch.randn(5)
    real_loss = F.binary_cross_entropy_with_logits(real, torch.ones(5))
    fake_loss = F.binary_cross_entropy_with_logits(fake, torch.zeros(5))
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), 0.5 * (real_loss + fake_loss))
    fooled = F.binary_cross_entropy_with_logits(fake, torch.ones(5))
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), fooled)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_gradients_pull_the_right_way(kind):
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all(), "descending raises the logits of real images"
    assert (fake.grad > 0).all()
    logits = torch.zeros(3, requires_grad=True)
    generator_loss(logits, kind).backward()
    assert (logits.grad < 0).all()


def test_adaptive_weight_is_a_clamped_ratio_without_gradient():
    fidelity = torch.tensor(3.0, requires_grad=True)
    weight = adaptive_weight(fidelity, torch.tensor(2.0))
    assert weight.item() == pytest.approx(3.0 / 2.0001)
    assert not weight.requires_grad
    assert adaptive_weight(fidelity, torch.tensor(0.0), limit=7.0) == 7.0


@pytest.fixture(scope="module")
def published():
    return random_lpips()


@pytest.fixture(scope="module")
def lpips(published, tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(published, file)
    return LPIPS(str(file))


def by_hand(state, x, y):
    """The definition, layer by layer, straight from the published tensors."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((image - shift[:, None, None]) / scale[:, None, None] for image in (x, y))
    stages = []
    for index in CONVOLUTIONS:
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        if index in (5, 10, 17, 24):
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        a, b = (F.relu(F.conv2d(value, weight, bias, padding=1)) for value in (a, b))
        if index in STAGE_ENDS:
            head = state[f"lin{len(stages)}.model.1.weight"]
            difference = a / a.square().sum(1, keepdim=True).sqrt() - b / b.square().sum(1, keepdim=True).sqrt()
            stages.append(F.conv2d(difference.square(), head).mean((1, 2, 3)))
    return stages


def test_lpips_equals_the_definition_stage_by_stage(lpips, published):
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    stages = by_hand(published, x, y)
    for stage, expected in enumerate(stages):
        a, b = lpips.features(x)[stage], lpips.features(y)[stage]
        ours = ((a - b).square() * lpips.heads[stage][:, None, None]).sum(1).mean((1, 2))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lpips(x, y), sum(stages), rtol=1e-4, atol=1e-5)
    assert lpips(x, x).abs().max() == 0


def test_lpips_is_frozen_and_its_gradient_reaches_the_first_image_only(lpips):
    x, y = torch.zeros(1, 3, 32, 32, requires_grad=True), torch.ones(1, 3, 32, 32, requires_grad=True)
    lpips.train()(x, y).sum().backward()
    assert not lpips.training
    assert x.grad.abs().sum() > 0
    assert y.grad is None
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_gradient_is_finite_where_all_features_are_zero(published, tmp_path):
    dead = {name: torch.zeros_like(value) if "features" in name else value for name, value in published.items()}
    save_file(dead, tmp_path / "dead.safetensors")
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    LPIPS(str(tmp_path / "dead.safetensors"))(x, torch.rand(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["two_torch_files", "lpips_package"])
def test_lpips_reads_the_common_layouts(layout, lpips, published, tmp_path):
    vgg = {name: value for name, value in published.items() if name.startswith("features")}
    heads = {name: value for name, value in published.items() if name.startswith("lin")}
    if layout == "two_torch_files":
        torch.save(
            {**vgg, "classifier.0.weight": torch.zeros(2)},
            tmp_path / "vgg16-397923af.pth",
            _use_new_zipfile_serialization=False,
        )
        torch.save(heads, tmp_path / "vgg.pth")
        weights = tmp_path
    else:
        starts = {0: 1, 5: 2, 10: 3, 17: 4, 24: 5}
        renamed = {}
        for name, value in vgg.items():
            index = int(name.split(".")[1])
            slice_number = max(number for start, number in starts.items() if index >= start)
            renamed[f"net.slice{slice_number}.{index}.{name.split('.')[2]}"] = value
        renamed |= {name.replace("lin", "lins.", 1): value for name, value in heads.items()}
        weights = tmp_path / "lpips.pt"
        torch.save(renamed, weights)
    read = LPIPS(str(weights)).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in lpips.state_dict().items())


def test_lpips_without_weights_is_refused(tmp_path):
    for weights, message in (
        (None, "none are given"),
        (str(tmp_path / "no.pth"), "no LPIPS weights there"),
        (str(tmp_path), "no LPIPS"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            LPIPS(weights)
        assert "perceptual weight to 0" in str(refusal.value)
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="lacks 30 of the 31 tensors"):
        LPIPS(str(tmp_path))
