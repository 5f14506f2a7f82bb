"""The convolutional encoder and decoder of the VQ-GAN family (taming, LlamaGen, IBQ, Open-MAGVIT2, GigaTok's halves).

Shapes: `B` batch, `C` channels, `H`, `W` height and width at a level. All layers keep `channels_last` inputs so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from ..layers import Unit

_NORM_EPS = 1e-6


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm as the whole family uses it (eps 1e-6)."""
    return nn.GroupNorm(groups, channels, eps=_NORM_EPS)


class ResBlock(Unit):
    """`x + conv(swish(norm(conv(swish(norm(x))))))`, with a 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int, norm_groups: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in, norm_groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(width_out, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=bias)
        self.shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H, W]`."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(Unit):
    """Residual single-head attention over all positions, scale `C^-0.5`; q, k and v come from one 1x1 convolution."""

    def __init__(self, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, norm_groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)  # each [B, 1, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Module):
    """Halves the resolution: 3x3 convolution, stride 2, padded by 1 on the right and the bottom only, or on all sides."""

    def __init__(self, width: int, all_sides: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=int(all_sides))
        self.missing = (0, 0, 0, 0) if all_sides else (0, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H/2, W/2]`."""
        return self.conv(F.pad(x, self.missing))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution.

    On a CPU both are one transposed convolution with a 4x4 kernel, equal up to rounding: 4 products for each output
    instead of 9, and no enlarged copy of the input (1.4 to 2 times faster with its backward pass).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, 2H, 2W]`."""
        if x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Each input pixel is smeared over 2x2 and then over 3x3: over 4x4 with the sums of neighbouring weights.
        smeared = F.avg_pool2d(F.pad(self.conv.weight.flip(-1, -2), (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        return F.conv_transpose2d(x, smeared.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked for, then a change of resolution."""

    def __init__(
        self,
        widths: tuple[int, int],
        blocks: int,
        attention: bool,
        norm_groups: int,
        dropout: float,
        bias: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        width_in, width = widths
        self.blocks = nn.ModuleList(
            ResBlock(width if index else width_in, width, norm_groups, dropout, bias) for index in range(blocks)
        )
        self.attentions = nn.ModuleList(Attention(width, norm_groups) for _ in range(blocks if attention else 0))
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to the width and resolution of the next level."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return self.resample(x)


def _middle(width: int, blocks: int, attention: bool, norm_groups: int, dropout: float, bias: bool) -> nn.Sequential:
    first, *rest = (ResBlock(width, width, norm_groups, dropout, bias) for _ in range(blocks))
    return nn.Sequential(first, *([Attention(width, norm_groups)] if attention else []), *rest)


def _level_widths(width: int, multipliers: Sequence[int], norm_groups: int) -> list[int]:
    widths = [width * multiplier for multiplier in multipliers]
    if not widths:
        raise ValueError("multipliers is empty; give one for each resolution, finest first, e.g. [1, 1, 2, 2, 4]")
    if wrong := [value for value in [width, *widths] if value % norm_groups]:
        raise ValueError(f"level width {wrong[0]} is not a multiple of norm_groups {norm_groups}; change width or norm_groups")
    return widths


class ConvEncoder(nn.Module):
    """Image to latent: one level for each multiplier, finest first, each half the resolution of the one before.

    Args:
        width: channels after the first convolution (LlamaGen: 128).
        multipliers: width of each level over `width`, finest first; the stride is `2^(levels-1)`.
        blocks: residual blocks of a level.
        z_channels: channels of the latent.
        attention: attend at the coarsest level, after each of its blocks, and in the middle.
        dropout: inside the residual blocks.
        in_channels: of the image.
        norm_groups: of every GroupNorm; 32 in all published models.
        middle_blocks: residual blocks after the coarsest level (Open-MAGVIT2: 4); the attention follows the first.
        bias: of the first convolution and those in residual blocks (Open-MAGVIT2 has none).
        pad_all_sides: when halving the resolution, instead of on the right and the bottom (Open-MAGVIT2).
        kernel_out: of the last convolution (Open-MAGVIT2: 1).

    Raises:
        ValueError: a level's width is not a multiple of `norm_groups`.
    """

    def __init__(
        self,
        width: PositiveInt = 128,
        multipliers: Sequence[PositiveInt] = (1, 1, 2, 2, 4),
        blocks: PositiveInt = 2,
        z_channels: PositiveInt = 256,
        attention: bool = True,
        dropout: Fraction = 0.0,
        in_channels: PositiveInt = 3,
        norm_groups: PositiveInt = 32,
        middle_blocks: PositiveInt = 2,
        bias: bool = True,
        pad_all_sides: bool = False,
        kernel_out: Literal[1, 3] = 3,
    ) -> None:
        super().__init__()
        widths = _level_widths(width, multipliers, norm_groups)
        self.z_channels, self.stride = z_channels, 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
        self.levels = nn.ModuleList()
        for index, pair in enumerate(pairwise([width, *widths])):
            coarsest = index == len(widths) - 1
            resample = None if coarsest else Downsample(pair[1], pad_all_sides)
            self.levels.append(Level(pair, blocks, attention and coarsest, norm_groups, dropout, bias, resample))
        self.middle = _middle(widths[-1], middle_blocks, attention, norm_groups, dropout, bias)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, kernel_out, padding=kernel_out // 2)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] to `[B, z_channels, H/stride, W/stride]`."""
        h = self.conv_in(image)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class ConvDecoder(nn.Module):
    """Latent to image: the levels of the encoder, coarsest first.

    Args:
        width: unit of the multipliers.
        multipliers: width of each level over `width`, finest first, as in the encoder.
        blocks: residual blocks of a level (LlamaGen: one more than in its encoder).
        z_channels: channels of the latent.
        attention: attend at the coarsest level and in the middle.
        dropout: inside the residual blocks.
        out_channels: of the image.
        norm_groups: of every GroupNorm.
        middle_blocks: residual blocks before the coarsest level (Open-MAGVIT2: 4); the attention follows the first.
        bias: of the convolutions in residual blocks (Open-MAGVIT2 has none).

    Raises:
        ValueError: a level's width is not a multiple of `norm_groups`.
    """

    upsample_layer: type[nn.Module] = Upsample  # called with a width; a variant is a subclass that names another

    def __init__(
        self,
        width: PositiveInt = 128,
        multipliers: Sequence[PositiveInt] = (1, 1, 2, 2, 4),
        blocks: PositiveInt = 3,
        z_channels: PositiveInt = 256,
        attention: bool = True,
        dropout: Fraction = 0.0,
        out_channels: PositiveInt = 3,
        norm_groups: PositiveInt = 32,
        middle_blocks: PositiveInt = 2,
        bias: bool = True,
    ) -> None:
        super().__init__()
        widths = _level_widths(width, multipliers, norm_groups)[::-1]
        self.z_channels, self.stride = z_channels, 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = _middle(widths[0], middle_blocks, attention, norm_groups, dropout, bias)
        self.levels = nn.ModuleList()
        for index, pair in enumerate(pairwise([widths[0], *widths])):
            resample = None if index == len(widths) - 1 else self.upsample_layer(pair[1])
            self.levels.append(Level(pair, blocks, attention and index == 0, norm_groups, dropout, bias, resample))
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, z_channels, h, w]` to `[B, 3, h*stride, w*stride]`, not clamped."""
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def check_halves(encoder: ConvEncoder, decoder: ConvDecoder) -> None:
    """A decoder must undo its encoder.

    Raises:
        ValueError: `z_channels` or `stride` differ.
    """
    for name in ("z_channels", "stride"):
        ours, theirs = getattr(encoder, name), getattr(decoder, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours} in the encoder, {theirs} in the decoder; make them equal")
