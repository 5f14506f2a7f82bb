"""The convolutional decoder with MAGVIT-v2's two extras (GigaTok, Open-MAGVIT2): depth to space, adaptive group norm.

Shapes: `B` batch, `C` channels, `Z` channels of the latent, `H`, `W` height and width at a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from .conv import ConvDecoder

_EPS = 1e-6


def spread(x: Tensor, side: int) -> Tensor:
    """`[B, side²·C, H, W]` to `[B, C, side·H, side·W]`, contiguous; channel `(row·side + column)·C + c` goes to that place."""
    blocks = x.unflatten(1, (side, side, -1))  # [B, row, column, C, H, W]
    return blocks.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class DepthToSpace(nn.Module):
    """Doubles the resolution: a 3x3 convolution to `4C` channels, each four then spread over 2x2 pixels.

    Channel `(row·2 + column)·C + c` goes to channel `c` of that row and column (DCR order). `pixel_shuffle` reads
    `c·4 + row·2 + column` instead.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]`, contiguous."""
        # Not channels-last: on a CPU torch's group norm takes the variance of such inputs as E[x²] − E[x]², and after an
        # adaptive norm, whose bias can be a hundred times the spread, it is wrong in the third digit.
        return spread(self.conv(x), 2)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and bias are linear in the spread and the mean of the decoder's input.

    Args:
        z_channels: `Z`.
        width: `C`.
        norm_groups: of the normalisation.
    """

    def __init__(self, z_channels: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm_groups = norm_groups
        self.gamma = nn.Linear(z_channels, width)
        self.beta = nn.Linear(z_channels, width)

    def forward(self, x: Tensor, spread: Tensor, mean: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]` by the statistics `[B, Z]` of `statistics`."""
        normal = F.group_norm(x, self.norm_groups, eps=_EPS)
        return normal * self.gamma(spread)[:, :, None, None] + self.beta(mean)[:, :, None, None]


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(var + 1e-6)` and mean over space, `[B, Z]`, computed in float32 or finer; the variance is the unbiased one."""
    variance, mean = torch.var_mean(z.to(torch.promote_types(z.dtype, torch.float32)), dim=(2, 3))
    return (variance + _EPS).sqrt().to(z.dtype), mean.to(z.dtype)


class AdaptiveDecoder(ConvDecoder):
    """`ConvDecoder` that upsamples by depth to space, with an adaptive group norm before each level.

    Args:
        width: unit of the multipliers.
        multipliers: width of each level over `width`, finest first, as in the encoder.
        blocks: residual blocks of a level.
        z_channels: channels of the latent `Z`.
        attention: attend at the coarsest level and in the middle.
        dropout: inside the residual blocks.
        out_channels: of the image.
        norm_groups: of every GroupNorm.
        adaptive_norm: false leaves the adaptive group norms out.
        middle_blocks: residual blocks before the coarsest level (Open-MAGVIT2: 4); the attention follows the first.
        bias: of the convolutions in residual blocks (Open-MAGVIT2 has none).

    Raises:
        ValueError: a level's width is not a multiple of `norm_groups`.
    """

    upsample_layer = DepthToSpace

    def __init__(
        self,
        width: PositiveInt = 128,
        multipliers: Sequence[PositiveInt] = (1, 1, 2, 2, 4),
        blocks: PositiveInt = 3,
        z_channels: PositiveInt = 256,
        attention: bool = False,
        dropout: Fraction = 0.0,
        out_channels: PositiveInt = 3,
        norm_groups: PositiveInt = 32,
        adaptive_norm: bool = True,
        middle_blocks: PositiveInt = 2,
        bias: bool = True,
    ) -> None:
        common = (width, multipliers, blocks, z_channels, attention, dropout, out_channels, norm_groups)
        super().__init__(*common, middle_blocks, bias)
        coarsest_first = [width * multiplier for multiplier in reversed(multipliers)]
        widths = [coarsest_first[0], *coarsest_first[:-1]] if adaptive_norm else []  # what enters each level
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(z_channels, entering, norm_groups) for entering in widths)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, z_channels, h, w]` to `[B, 3, h*stride, w*stride]`, not clamped."""
        if not self.adaptive:
            return super().forward(z)
        style = statistics(z)
        h = self.middle(self.conv_in(z))
        for norm, level in zip(self.adaptive, self.levels, strict=True):
            h = level(norm(h, *style).contiguous())  # see `DepthToSpace`; the first level's may come from a quantizer
        return self.conv_out(F.silu(self.norm_out(h)))
