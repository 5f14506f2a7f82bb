import pytest
import torch
from tokar.errors import UserError
from tokar.models.tokenizers.discriminators import PatchGAN
from torch import nn

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
