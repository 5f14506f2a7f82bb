import pytest
import torch
import torch.nn.functional as F
from frozen_models import SIZES, save_random
from tokar.conf.signature import check_components
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.tokenizers.augment import DiffAug
from tokar.models.tokenizers.discriminators import DinoDiscriminator, LocalBatchNorm, PatchGAN
from tokar.models.tokenizers.losses import discriminator_loss, r1_penalty
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Names and shapes of the public PatchGAN checkpoints (LlamaGen, GigaTok), buffers included.
NORM = {"weight": True, "bias": True, "running_mean": True, "running_var": True, "num_batches_tracked": False}
KEYS = {
    "main.0.weight": (64, 3, 4, 4),
    "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4),
    "main.5.weight": (256, 128, 4, 4),
    "main.8.weight": (512, 256, 4, 4),
    "main.11.weight": (1, 512, 4, 4),
    "main.11.bias": (1,),
    **{f"main.3.{name}": (128,) if wide else () for name, wide in NORM.items()},
    **{f"main.6.{name}": (256,) if wide else () for name, wide in NORM.items()},
    **{f"main.9.{name}": (512,) if wide else () for name, wide in NORM.items()},
}


def test_published_names_shapes_and_size():
    with torch.device("meta"):
        discriminator = PatchGAN()
        logits = discriminator(torch.empty(2, 3, 256, 256))
    assert {name: tuple(value.shape) for name, value in discriminator.state_dict().items()} == KEYS
    assert sum(p.numel() for p in discriminator.parameters()) == pytest.approx(2.77e6, abs=5e3)
    assert logits.shape == (2, 1, 30, 30)


def test_initialised_as_pix2pix():
    torch.manual_seed(0)
    discriminator = PatchGAN()
    convolutions = torch.cat([m.weight.detach().flatten() for m in discriminator.modules() if isinstance(m, nn.Conv2d)])
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([m.weight.detach() for m in norms])
    assert abs(convolutions.mean()) < 1e-4
    assert convolutions.std() == pytest.approx(0.02, rel=0.01)
    assert scales.mean() == pytest.approx(1.0, abs=0.003)
    assert scales.std() == pytest.approx(0.02, rel=0.1)
    assert all((m.bias == 0).all() for m in norms)


@pytest.mark.parametrize(("layers", "smallest"), [(1, 6), (2, 12), (3, 24)])
def test_small_images_need_fewer_layers(layers, smallest):
    discriminator = PatchGAN(width=4, layers=layers)
    assert discriminator(torch.zeros(2, 3, smallest, smallest + 8)).shape[:3] == (2, 1, 1)
    with pytest.raises(UserError, match=f"needs images of {smallest} pixels, not {smallest - 1}; give it fewer layers"):
        discriminator(torch.zeros(2, 3, smallest - 1, smallest))


def test_a_logit_sees_seventy_pixels():
    discriminator = PatchGAN(width=2).eval()
    image = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (70, 70)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Folder of a small ViT for 32 pixels, patches of 8."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dino")
    save_random("ViTModel", folder, **SIZES, patch_size=8, image_size=32)
    return str(folder)


@pytest.fixture
def judge(dino):
    torch.manual_seed(0)
    return DinoDiscriminator(dino, size=32, layers=(0, 1, 2), kernel=3)


def head_by_hand(head, x):
    """Spectral-norm 1x1 convolution, norm, LeakyReLU; residual with the circular one; one more 1x1 convolution."""
    first, second, last = head[0], head[1].inner, head[2]

    def normal(y):
        y = (y - y.mean((0, 2), keepdim=True)) / (y.var((0, 2), unbiased=False, keepdim=True) + 1e-6).sqrt()
        return F.leaky_relu(y, 0.2)

    x = normal(F.conv1d(x, first[0].weight, first[0].bias))
    wrapped = torch.cat([x[..., -1:], x, x[..., :1]], dim=2)
    x = (x + normal(F.conv1d(wrapped, second[0].weight, second[0].bias))) / 2**0.5
    return F.conv1d(x, last.weight, last.bias)[:, 0]


def test_dino_judges_tokens_plus_class_token_at_every_depth(judge):
    judge.eval()
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        pixels = ((image + 1) / 2 - mean) / std
        x = judge.frozen.embeddings(pixels)
        hidden = [x]
        for block in judge.frozen.layers:
            hidden.append(block(hidden[-1]))
        expected = [head_by_hand(head, (h[:, 1:] + h[:, :1]).mT) for head, h in zip(judge.heads, hidden, strict=True)]
    torch.testing.assert_close(judge(image), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert judge(image).shape == (4, 3 * 16)


def test_dino_saves_and_trains_its_heads_alone(judge):
    assert all(name.startswith("heads.") for name in judge.state_dict())
    assert all(name.startswith("heads.") for name, _ in judge.named_parameters())
    judge.train().requires_grad_(True)
    assert not judge.frozen.training
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    judge(image).sum().backward()
    assert image.grad.abs().sum() > 0, "the tokenizer learns through the frozen network"
    assert all(value.grad is not None for value in judge.parameters())
    assert all(value.grad is None and not value.requires_grad for value in judge.frozen.parameters())


def test_dino_learns_to_tell_images_apart(judge):
    real, fake = torch.rand(8, 3, 32, 32).round() * 2 - 1, torch.rand(8, 3, 32, 32) * 2 - 1
    optimizer = torch.optim.Adam(judge.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        losses.append(discriminator_loss(judge(real), judge(fake)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_spectral_norm_bounds_the_heads(judge):
    weights = [layer for layer in judge.heads.modules() if isinstance(layer, nn.Conv1d)]
    assert len(weights) == 3 * 3
    for _ in range(30):
        judge(torch.rand(2, 3, 32, 32))
    for layer in weights:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.02)


def test_local_batch_norm_takes_groups_by_themselves():
    norm = LocalBatchNorm(5, virtual_batch=8)
    x = torch.randn(16, 5, 7) * 3 + 1
    alone = torch.cat([F.batch_norm(half, None, None, training=True, eps=1e-6) for half in x.split(8)])
    torch.testing.assert_close(norm(x), alone)
    assert not torch.allclose(norm(x), F.batch_norm(x, None, None, training=True, eps=1e-6))
    uneven = norm(x[:9])
    torch.testing.assert_close(uneven[5:], norm(x[5:9]))
    assert not list(norm.buffers())


def test_dino_crops_averages_down_and_enlarges(judge):
    wide = torch.rand(2, 3, 48, 64)
    torch.manual_seed(0)
    seen = [judge._fit(wide) for _ in range(40)]
    averaged = [view for view in seen if torch.equal(view, F.adaptive_avg_pool2d(wide, 32))]
    crops = [view for view in seen if any(torch.equal(view, part) for part in _windows(wide))]
    assert len(averaged) + len(crops) == 40
    assert min(len(averaged), len(crops)) > 10
    assert all(torch.equal(judge.eval()._fit(wide), averaged[0]) for _ in range(4))
    small = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(judge.train()._fit(small), F.interpolate(small, (32, 32), mode="bicubic"))


def _windows(image):
    return image.unfold(2, 32, 1).unfold(3, 32, 1).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)


def test_dino_augments_while_training(dino):
    judge = DinoDiscriminator(dino, size=32, layers=(2,), kernel=3, augment=DiffAug())
    image = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    first, second = judge(image), judge(image)
    assert not torch.allclose(first, second, atol=1e-2)
    judge.eval()
    torch.testing.assert_close(judge(image), judge(image), rtol=0, atol=0)


def test_dino_takes_the_r1_penalty_with_plain_attention(judge):
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        logits = judge(image)
    r1_penalty(logits, image).backward()
    assert judge.heads[0][0][0].parametrizations.weight.original.grad.abs().sum() > 0


def test_dino_in_half_precision(judge):
    logits = judge.bfloat16()(torch.rand(2, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"kernel": 4}, "kernel 4 is even; make it odd"),
        ({"layers": [0, 3]}, r"layers \[0, 3\] of a network with 2 blocks; choose some from 0 to 2"),
        ({"size": 30, "layers": [0]}, "size 30 is no multiple of the patch 8; use 24"),
    ],
)
def test_dino_refuses_what_cannot_be_built(dino, wrong, line):
    node = {"_target_": "tokar.models.tokenizers.discriminators.DinoDiscriminator", "path": dino, "layers": [0], **wrong}
    with pytest.raises(UserError, match=line):
        build(node)


def test_the_configured_discriminators_exist(root):
    from omegaconf import OmegaConf

    for file in (root / "conf" / "discriminator").glob("*.yaml"):
        node = OmegaConf.to_container(OmegaConf.load(file))
        assert not list(check_components(node)), file
