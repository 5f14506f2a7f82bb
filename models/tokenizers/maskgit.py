"""The convolutional decoder of MaskGIT's VQ-GAN (Chang et al. 2022), which TiTok's first tokenizers end with.

Shapes: `B` batch, `C` channels, `Z` channels of the latent, `H`, `W` height and width at a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import PositiveInt
from ..layers import Unit
from .conv import Upsample, group_norm


class MaskGITBlock(Unit):
    """`conv(swish(norm(conv(swish(norm(x))))))` without biases, plus `x`, or where the width changes, its own 1x1 image.

    The 1x1 shortcut reads the block's result, not its input: a slip of the original that its weights were trained with.
    """

    def __init__(self, width_in: int, width_out: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in, norm_groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(width_out, norm_groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.shortcut = None if width_in == width_out else nn.Conv2d(width_out, width_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.shortcut is None else self.shortcut(h))


class MaskGITDecoder(nn.Module):
    """Latent to image, each level twice the resolution of the one before; no attention.

    Args:
        width: unit of the multipliers.
        multipliers: width of each level over `width`, finest first.
        blocks: residual blocks of a level, and in the middle.
        z_channels: channels of the latent `Z`.
        norm_groups: of every GroupNorm.
    """

    def __init__(
        self,
        width: PositiveInt = 128,
        multipliers: Sequence[PositiveInt] = (1, 1, 2, 2, 4),
        blocks: PositiveInt = 2,
        z_channels: PositiveInt = 256,
        norm_groups: PositiveInt = 32,
    ) -> None:
        super().__init__()
        widths = [width * multiplier for multiplier in reversed(multipliers)]
        self.z_channels, self.stride = z_channels, 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = _blocks(widths[0], widths[0], blocks, norm_groups)
        self.levels = nn.ModuleList(_blocks(*pair, blocks, norm_groups) for pair in pairwise([widths[0], *widths]))
        self.upsamples = nn.ModuleList(Upsample(each) for each in widths[:-1])
        self.norm_out = group_norm(width * multipliers[0], norm_groups)
        self.conv_out = nn.Conv2d(width * multipliers[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, Z, h, w]` to `[B, 3, h*stride, w*stride]`, not clamped."""
        h = self.levels[0](self.middle(self.conv_in(z)))
        for upsample, level in zip(self.upsamples, self.levels[1:], strict=True):
            h = level(upsample(h))
        return self.conv_out(F.silu(self.norm_out(h)))


def _blocks(width_in: int, width_out: int, count: int, norm_groups: int) -> nn.Sequential:
    return nn.Sequential(*(MaskGITBlock(width_out if index else width_in, width_out, norm_groups) for index in range(count)))
