"""Discriminators for the adversarial loss of tokenizers. Shapes: `B` batch, `h`, `w` the grid of patches judged."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import UserError
from ...ranges import PositiveInt

_KERNEL = 4


class PatchGAN(nn.Module):
    """The 70x70 patch discriminator of pix2pix: judges overlapping patches, one logit each.

    With the defaults 2.77 M parameters and 30x30 logits at 256 pixels, as LlamaGen and GigaTok use it.

    Args:
        width: channels of the first layer; doubled by each layer up to eight times.
        layers: strided layers; fewer for small images, as each halves the resolution.
        in_channels: of the image.
    """

    def __init__(self, width: PositiveInt = 64, layers: PositiveInt = 3, in_channels: PositiveInt = 3) -> None:
        super().__init__()
        self.layers = layers
        modules: list[nn.Module] = [nn.Conv2d(in_channels, width, _KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            wider = width * min(2**index, 8)
            modules.append(nn.Conv2d(channels, wider, _KERNEL, stride=stride, padding=1, bias=False))
            modules += [nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            channels = wider
        modules.append(nn.Conv2d(channels, 1, _KERNEL, padding=1))
        self.main = nn.Sequential(*modules)
        self.apply(_init)

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, 1, h, w]` of images `[B, 3, H, W]`; high means real.

        Raises:
            UserError: the image is too small for the number of layers.
        """
        # Two more layers with stride 1 each take a pixel away after the halvings.
        smallest = 3 * 2**self.layers
        if min(image.shape[-2:]) < smallest:
            raise UserError(
                f"PatchGAN with {self.layers} layers needs images of {smallest} pixels, not {min(image.shape[-2:])}",
                fix="give it fewer layers",
            )
        return self.main(image)


def _init(module: nn.Module) -> None:
    """pix2pix: convolutions N(0, 0.02), batch norm scales N(1, 0.02), offsets 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
