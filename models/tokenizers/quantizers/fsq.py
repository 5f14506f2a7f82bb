"""Finite scalar quantization (Mentzer et al. 2023).

Shapes: `D` channels, one for each entry of `levels`, `…` any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ....ranges import PositiveInt
from .base import PointwiseQuantizer, Quantized, straight_through

_MARGIN = 1e-3  # the paper's ε: the outermost levels can be reached


class FSQ(PointwiseQuantizer):
    """Each channel is bounded by tanh and rounded to one of its levels in [-1, 1]; no codebook, no loss.

    The index counts in mixed base, channel 0 fastest. Gradients pass the rounding straight through.

    Args:
        levels: number of values of each channel, at least 3. The paper's choices: 2^8 [8,6,5], 2^10 [8,5,5,5],
            2^12 [7,5,5,5,5], 2^14 [8,8,8,6,5], 2^16 [8,8,8,5,5,5].

    Raises:
        ValueError: no channel, or one with fewer than 3 levels.
    """

    def __init__(self, levels: Sequence[PositiveInt] = (8, 8, 8, 6, 5)) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels {list(levels)} must each be 3 or more (LFQ has two); e.g. [8, 5, 5, 5]")
        self.levels = tuple(levels)
        self.dim, self.codebook_size = len(self.levels), math.prod(self.levels)

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[…, D]` of indices `[…]`."""
        levels, basis = self._levels_and_basis(indices.device)
        half = levels // 2
        return (indices[..., None] // basis % levels - half).float() / half

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize vectors `[…, D]`."""
        levels, basis = self._levels_and_basis(z.device)
        half = levels // 2
        reach = (levels - 1) * (1 + _MARGIN) / 2
        offset = 0.5 * (levels % 2 == 0)  # an even number of levels has none at 0: shifted so that z = 0 still gives 0
        bounded = torch.tanh(z + torch.atanh(offset / reach)) * reach - offset
        rounded = bounded.round()
        indices = ((rounded.long() + half) * basis).sum(-1)
        return Quantized(straight_through(rounded, bounded) / half, indices, {})

    def _levels_and_basis(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Made anew, not buffers: they are no state, and would be left behind when a model is built on the meta device.
        basis = [math.prod(self.levels[:channel]) for channel in range(self.dim)]
        return torch.tensor(self.levels, device=device), torch.tensor(basis, device=device)
