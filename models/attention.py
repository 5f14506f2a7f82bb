"""One attention for all generators: rotary positions, the KV cache, and the kernel behind one function.

Shapes: `B` batch, `L` query slots, `S` slots in all, `H` heads, `D` head width, `C = H·D`, `d` axes of a place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import HALF, Kernel, flash, flex, sdpa


def rope_table(coords: Sequence[Sequence[int]], head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotary table `[2, S, D]` (cosine, signed sine) for interleaved pairs; each axis owns an equal run of pairs.

    The angle of axis `a` is `coords[s][a] · base^(-2i/(D/d))`, `i = 0 … D/(2d)-1`. A slot with a negative coordinate gets
    cosine and sine 0, not the identity: the published next-token models zero the queries and keys of their prefix.

    Args:
        coords: `[S, d]` places.
        head_dim: `D`, a multiple of `2·d`.
        base: wavelength base.

    Raises:
        ValueError: the heads have no room for so many axes.
    """
    axes = len(coords[0])
    if head_dim % (2 * axes):
        raise ValueError(
            f"a head is {head_dim} wide; {axes}-D rotary positions need a multiple of {2 * axes}; change dim or heads"
        )
    places = torch.tensor(coords, dtype=torch.float32, device="cpu")
    axis_dim = head_dim // places.shape[1]
    rates = 1.0 / base ** (torch.arange(0, axis_dim, 2, dtype=torch.float32, device="cpu") / axis_dim)
    angles = (places[:, :, None] * rates).flatten(1).repeat_interleave(2, dim=1)
    sign = torch.tensor([-1.0, 1.0], device="cpu").repeat(head_dim // 2)
    placed = (places >= 0).all(dim=1, keepdim=True)
    return torch.stack((angles.cos(), angles.sin() * sign)) * placed


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate interleaved pairs `(x0, x1)` to `(x0·cos - x1·sin, x1·cos + x0·sin)`, in float32.

    Args:
        x: `[B, L, ..., D]`.
        rope: `[2, L, D]` rows of `rope_table`.
    """
    cos, sin = rope.view(2, rope.shape[1], *[1] * (x.ndim - 3), rope.shape[2])
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class KVCache:
    """Keys and values of all layers in two buffers `[layers, B, H, S, D]` made once, and how many slots are final.

    Args:
        layers: number of attention layers.
        batch: rows `B`.
        heads: `H`.
        slots: `S`, the longest sequence.
        head_dim: `D`.
        device: where the buffers live.
        dtype: type of keys and values.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, slots: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, batch, heads, slots, head_dim)
        # Zeros, not garbage: the static mode multiplies masked slots by weight 0, and 0 · NaN is NaN.
        self._set(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
        self.length = 0
        self.position: Tensor | None = None

    def _set(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._layers = list(zip(keys.unbind(0), values.unbind(0), strict=True))

    def rows(self, start: int, stop: int) -> KVCache:
        """The same memory, seen by the batch rows `start … stop-1` only."""
        view = object.__new__(KVCache)
        view._set(self.keys[:, start:stop], self.values[:, start:stop])
        view.length, view.position = self.length, None
        return view

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put `[B, H, L, D]` after the final slots and return all keys and values up to there.

        Does not advance `length`: whoever commits does, so a unit that is proposed again overwrites itself.
        With `position` (`[L]` int64) set, writes there instead and returns whole buffers, so that shapes never change.
        """
        all_keys, all_values = self._layers[layer]
        if self.position is not None:
            return all_keys.index_copy_(2, self.position, keys), all_values.index_copy_(2, self.position, values)
        count = keys.shape[2]
        all_keys.narrow(2, self.length, count).copy_(keys)
        all_values.narrow(2, self.length, count).copy_(values)
        stop = self.length + count
        return all_keys.narrow(2, 0, stop), all_values.narrow(2, 0, stop)


@dataclass
class Context:
    """What attention must know beside its input.

    Args:
        rope: `[2, L, D]` rotary rows of the query slots.
        causal: the mask is the lower triangle.
        mask: bool, broadcast to `[B, H, L, S]`, true where a key is visible; `None` with `causal` false: all are visible.
        cache: keys and values of earlier slots.
        kernel: which one to take; flex where there are `blocks`, flash where there is no `mask`, else sdpa runs.
        blocks: a BlockMask that says what `mask` and `causal` say.
    """

    rope: Tensor | None = None
    causal: bool = False
    mask: Tensor | None = None
    cache: KVCache | None = None
    kernel: Kernel = "sdpa"
    blocks: Any = None


def attend(
    query: Tensor, key: Tensor, value: Tensor, context: Context, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of `[B, H, L, D]` over `[B, H, S, D]`: the only place that calls a kernel.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, H, S, D]`.
        value: `[B, H, S, D]`.
        context: mask.
        scale: of the scores; `None`: `1/sqrt(D)`.
        dropout: rate on the weights.
    """
    if context.kernel == "flex" and context.blocks is not None and not dropout:
        return flex(query, key, value, context.blocks, scale)
    if context.kernel == "flash" and context.mask is None and not dropout and value.dtype in HALF and value.is_cuda:
        return flash(query, key, value, context.causal, scale)
    return sdpa(query, key, value, context.mask, context.causal, scale, dropout)


Bias = Literal["none", "keyless", "all"]
"""Which linear layers of a block have a bias; `keyless`: all but the projection to keys (VAR)."""
QKNorm = Literal["none", "layer", "l2"]
"""Of queries and keys, head by head: LayerNorm, or unit length and a learned temperature."""
_HOTTEST = math.log(100.0)  # VAR's and Swin v2's bound of the learned temperature
_COOLEST = math.log(4.0)  # VAR's start


class Attention(nn.Module):
    """Multi-head self-attention with one fused input projection.

    Args:
        dim: width `C`.
        heads: `H`; `C` must be a multiple of it.
        dropout: rate after the output projection.
        bias: of the projections.
        qk_norm: `layer`: LayerNorm of each head; `l2`: `q·exp(min(t, ln 100))/|q|` with a learned `t` for each head,
            `k/|k|`, and scores that are not scaled.
        scale: of the scores without `l2`; `None`: `1/sqrt(D)`.
        qk_eps: of the LayerNorm.
        weight_dropout: rate on the attention weights.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        bias: Bias = "none",
        qk_norm: QKNorm = "none",
        scale: float | None = None,
        qk_eps: float = 1e-6,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout, self.weight_dropout = heads, dim // heads, dropout, weight_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias == "all")
        self.qv_bias = nn.Parameter(torch.zeros(2, dim)) if bias == "keyless" else None
        self.out = nn.Linear(dim, dim, bias=bias != "none")
        self.norms = nn.ModuleList(nn.LayerNorm(self.head_dim, eps=qk_eps) for _ in range(2 if qk_norm == "layer" else 0))
        self.temperature = nn.Parameter(torch.full((heads, 1), _COOLEST)) if qk_norm == "l2" else None
        self.scale = 1.0 if qk_norm == "l2" else scale

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`.

        Args:
            x: input.
            context: positions, mask, cache.
            layer: index of this layer in the cache.
        """
        qkv = self._project(x).unflatten(-1, (3, self.heads, self.head_dim))
        both, value = self._normalise(qkv[:, :, :2]), qkv[:, :, 2].transpose(1, 2)
        if context.rope is not None:
            both = rotate(both, context.rope)
        query, key = both.transpose(1, 3).unbind(2)
        if context.cache is not None:
            key, value = context.cache.write(layer, key, value)
        mixed = attend(query, key, value, context, self.scale, self.weight_dropout if self.training else 0.0)
        return F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def _project(self, x: Tensor) -> Tensor:
        if self.qv_bias is None:
            return self.qkv(x)
        query, value = self.qv_bias
        return F.linear(x, self.qkv.weight, torch.cat((query, torch.zeros_like(query), value)))

    def _normalise(self, both: Tensor) -> Tensor:
        """Queries and keys `[B, L, 2, H, D]`."""
        if len(self.norms):
            return torch.stack([norm(part) for norm, part in zip(self.norms, both.unbind(2), strict=True)], dim=2)
        if self.temperature is not None:
            factor = torch.stack((self.temperature.clamp(max=_HOTTEST).exp(), torch.ones_like(self.temperature)))
            return F.normalize(both, dim=-1) * factor.to(both.dtype)
        return both
