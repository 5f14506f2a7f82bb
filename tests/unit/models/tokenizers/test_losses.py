import pytest
import torch
import torch.nn.functional as F
from frozen_models import save_random
from lpips_weights import CONVOLUTIONS, STAGE_ENDS, random_lpips
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.tokenizers.losses import (
    LPIPS,
    ConvNextPerceptual,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
    warm_up,
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


def test_warm_up_rises_once():
    assert [warm_up(step, 10, 4) for step in (0, 10, 11, 13, 14, 99)] == [0, 0, 0.25, 0.75, 1, 1]
    assert [warm_up(step, 10, 0) for step in (9, 10, 11)] == [0, 1, 1]


def test_r1_of_a_linear_judge_is_its_squared_weight():
    weight = torch.randn(3, 4, 4, requires_grad=True)
    image = torch.randn(5, 3, 4, 4, requires_grad=True)
    logits = (image * weight).sum((1, 2, 3))
    penalty = r1_penalty(logits, image)
    torch.testing.assert_close(penalty, weight.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, 2 * weight)


def test_r1_takes_each_image_by_itself_and_the_mean_of_its_logits():
    torch.manual_seed(0)
    judge = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 3))
    image = torch.randn(3, 3, 8, 8, requires_grad=True)
    alone = []
    for one in image.detach():
        one.requires_grad_(True)
        (gradient,) = torch.autograd.grad(judge(one[None]).mean(), one)
        alone.append(gradient.square().sum())
    torch.testing.assert_close(r1_penalty(judge(image), image), torch.stack(alone).mean())


def test_lecam_by_hand_over_two_steps():
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([[1.0], [-3.0]])
    average_real, average_fake = 0.1 * 0.5, 0.1 * -1.0
    expected = ((2 - average_fake) ** 2 + 0) / 2 + (0 + (average_real + 3) ** 2) / 2
    torch.testing.assert_close(lecam(real, fake), torch.tensor(expected))
    lecam(real + 1, fake - 1)
    torch.testing.assert_close(lecam.real, torch.tensor(0.9 * 0.05 + 0.1 * 1.5))
    torch.testing.assert_close(lecam.fake, torch.tensor(0.9 * -0.1 + 0.1 * -2.0))
    before = dict(lecam.state_dict())
    assert set(before) == {"real", "fake"}, "a resumed run goes on from them"
    lecam.eval()(real, fake)
    assert all(torch.equal(value, before[name]) for name, value in lecam.state_dict().items())


def test_lecam_pulls_logits_to_the_other_kinds_average():
    lecam = LeCam()
    real, fake = torch.full((3,), 2.0, requires_grad=True), torch.full((3,), -2.0, requires_grad=True)
    lecam(real, fake).backward()
    assert (real.grad > 0).all(), "descending lowers the logits of images"
    assert (fake.grad < 0).all()


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("convnext")
    model = save_random(
        "ConvNextForImageClassification", folder, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=7
    )
    return model, ConvNextPerceptual(str(folder), size=32)


def test_convnext_is_the_mean_square_of_logits(convnext):
    model, perceptual = convnext
    x, y = torch.rand(2, 3, 48, 40) * 2 - 1, torch.rand(2, 3, 48, 40) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        a, b = (
            model(pixel_values=(F.interpolate((i + 1) / 2, (32, 32), mode="bilinear", antialias=True) - mean) / std).logits
            for i in (x, y)
        )
    torch.testing.assert_close(perceptual(x, y).mean(), F.mse_loss(a, b))
    assert perceptual(x, y).shape == (2,)
    assert perceptual(x, x).abs().max() == 0


def test_convnext_is_frozen_and_its_gradient_reaches_the_first_image_only(convnext):
    x, y = torch.zeros(1, 3, 32, 32, requires_grad=True), torch.ones(1, 3, 32, 32, requires_grad=True)
    perceptual = convnext[1].train().requires_grad_(True)
    perceptual(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None
    assert not any(value.requires_grad for value in perceptual.frozen.parameters())
    assert not perceptual.state_dict()


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
