"""Transformer layers of tokenizers: pre-norm self-attention, and the DETR decoder layer (Q-Former) with cross-attention.

Shapes: `B` batch, `L` queries, `S` keys, `W` width, `H` heads, `D = W/H` head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Context, attend
from ..layers import Unit

_ALL_VISIBLE = Context()
_MLP_RATIO = 4
_STD = 0.02


class MultiHeadAttention(nn.Module):
    """Attention with biases everywhere, initialised as `nn.MultiheadAttention` is.

    Args:
        width: `W`.
        heads: `H`.
        qk_norm: LayerNorm over the width of each head on queries and keys.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} is not a multiple of {heads} heads; change one of them")
        self.heads = heads
        # Bare parameters: the thirds are used apart, and ZeRO-3 gathers a layer's weight only where that layer is called.
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias = nn.Parameter(torch.zeros(3 * width))
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, L, W]` from queries `[B, L, W]`, keys and values `[B, S, W]`; positions are already added."""
        parts = zip((query, key, value), self.weight.chunk(3), self.bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)) for x, weight, bias in parts)
        mixed = attend(self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2), _ALL_VISIBLE)
        return self.out(mixed.transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """`Linear(W, 4W)` – GELU – `Linear(4W, W)`."""
    return nn.Sequential(nn.Linear(width, _MLP_RATIO * width), nn.GELU(), nn.Linear(_MLP_RATIO * width, width))


class EncoderLayer(Unit):
    """`x ← x + attention(LN x)`, `x ← x + mlp(LN x)`; positions belong into its input.

    Args:
        width: `W`.
        heads: `H`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = feed_forward(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, W]` to the same."""
        u = self.norm1(x)
        x = x + self.self_attention(u, u, u)
        return x + self.mlp(self.norm2(x))


class DecoderLayer(Unit):
    """Self-attention, cross-attention, feed-forward, each pre-norm (Carion et al. 2020, as GigaTok uses it).

    Positions are added anew to queries and keys in every layer, never to values.

    Args:
        width: `W`.
        heads: `H`.
        qk_norm: see `MultiHeadAttention`.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = MultiHeadAttention(width, heads, qk_norm)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = feed_forward(width)

    def forward(self, x: Tensor, positions: Tensor, memory: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[B, L, W]` to the same.

        Args:
            x: queries.
            positions: of the queries, `[L, W]`.
            memory: keys (their positions added, once for all layers) and values, `[B, S, W]`, not normalised; `None`: the
                normalised queries themselves.
        """
        u = self.norm1(x)
        placed = u + positions
        x = x + self.self_attention(placed, placed, u)
        u = self.norm2(x)
        placed = u + positions
        key, value = (placed, u) if memory is None else memory
        x = x + self.cross_attention(placed, key, value)
        return x + self.mlp(self.norm3(x))


def position_table(count: int, width: int) -> nn.Parameter:
    """Learned vectors `[count, W]`, drawn from N(0, 1/W)."""
    return nn.Parameter(torch.randn(count, width) * width**-0.5)


def grid_of(image_size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of this side, or height and width.

    Raises:
        ValueError: the patches do not fill the image.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch or width % patch:
        raise ValueError(f"an image of {height}x{width} is not a multiple of patches of {patch} pixels; change one of them")
    return height // patch, width // patch


def init_truncated(module: nn.Module) -> None:
    """GigaTok's initialisation: linear and convolution weights from a truncated N(0, 0.02²), biases 0.

    Norms and bare parameters (position tables, the input projection of attention) keep their own.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
