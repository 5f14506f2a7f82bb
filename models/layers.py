"""Building blocks shared by the networks.

Shapes: `B` batch, `L` slots, `C` width, `F` hidden width of the feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Module):
    """A part that a network repeats: whoever compiles, recomputes or shards a network does so unit by unit.

    Units do not lie in one another, and their inputs and outputs are tensors.
    """


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in float32, cast back to the input's type, then scaled.

    Args:
        dim: width `C`.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `[..., C]`."""
        # The cast comes before the weight: the other order differs in half precision from the published networks.
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight


def swiglu_hidden(dim: int, multiple_of: int) -> int:
    """Hidden width of a SwiGLU layer: two thirds of `4·dim`, rounded up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    return -(-hidden // multiple_of) * multiple_of


class SwiGLU(nn.Module):
    """Gated feed-forward `down(silu(gate x) · up x)` without bias; gate and up share one matrix.

    Args:
        dim: width `C`.
        hidden: width `F`.
        dropout: rate after `down`.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class GELUFeedForward(nn.Module):
    """Feed-forward `down(gelu(up x))`.

    Args:
        dim: width `C`.
        hidden: width `F`.
        bias: of both layers.
        dropout: rate after `down`.
        exact: GELU itself, and dropout before `down` too (RAR's, timm's); else its tanh approximation.
    """

    def __init__(self, dim: int, hidden: int, bias: bool = True, dropout: float = 0.0, exact: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.dropout, self.exact = dropout, exact

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        hidden = F.gelu(self.up(x), approximate="none" if self.exact else "tanh")
        if self.exact:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return F.dropout(self.down(hidden), self.dropout, self.training)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x·(1 + scale) + shift` of adaptive layer norm."""
    return torch.addcmul(shift, x, 1 + scale)


def sincos_table(grid: tuple[int, int], width: int, base: float = 10000.0) -> Tensor:
    """Sines and cosines of rows, then of columns, `[h*w, W]`, each at `W/4` rates `base^(-4i/W)` (MAE, He et al. 2021).

    Raises:
        ValueError: the width is not a multiple of four.
    """
    if width % 4:
        raise ValueError(f"a width of {width} is not a multiple of 4, which sincos positions need; choose another width")
    rates = base ** -(torch.arange(width // 4, device="cpu") / (width // 4))
    places = torch.cartesian_prod(*(torch.arange(side, device="cpu") for side in grid))
    angles = places[:, :, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero the whole branch `[B, ...]` of a sample at `rate`, scale the others up."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (keep / (1.0 - rate)).to(x.dtype)


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Draw every linear and embedding weight of `module` from N(0, std²); biases are zeroed."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
