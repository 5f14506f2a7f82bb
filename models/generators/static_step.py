"""The repeated step of generation with shapes that never change: what `torch.compile` and the GPU can make fast.

Shapes: `B` batch, `L` slots of the step, `S` slots of the cache, `C` width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention import Context, KVCache


class Transforming(Protocol):
    """A generator as its step sees it."""

    def _transform(self, x: Tensor, context: Context, modulation: Tensor | None) -> Tensor:
        """Hidden states of slots with inputs `x [B, L, C]`."""


def static_step(
    generator: Transforming,
    x: Tensor,
    rope: Tensor | None,
    position: Tensor,
    seen: Tensor,
    modulation: Tensor | None,
    cache: KVCache,
) -> Tensor:
    """Hidden states `[B, L, …]` of slots that attend over the whole buffer of the cache.

    Args:
        generator: whose transformer runs.
        x: inputs `[B, L, C]`.
        rope: `[2, L, D]` rows.
        position: `[L]` int64, where keys and values go.
        seen: bool, broadcast to `[B, H, L, S]`: which places of the buffer each slot sees.
        modulation: of the transformer.
        cache: written at `position`; its length stays.
    """
    cache.position = position
    hidden = generator._transform(x, Context(rope, mask=seen, cache=cache), modulation)
    cache.position = None
    return hidden


@functools.cache
def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a network and its inputs, compiled; other sizes or batches make it compile once more, then for any size."""
    # Of the function, not of one model: a copy of a model would else carry a step bound to the weights of the first.
    return torch.compile(part)


def compiled_step() -> Callable[..., Tensor]:
    """`static_step` compiled."""
    return compiled(static_step)
