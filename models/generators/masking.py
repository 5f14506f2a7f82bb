"""What block diffusion hides from itself: how much of each block, which tokens, and how the loss makes up for it.

Shapes: `B` batch, `N` tokens in the order in which they are revealed, `K` blocks, `G` windows.
All draws are functions of numbers in [0, 1) that are handed in, row by row, so one sample's do not depend on its batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .planned import Facts

LEAST = 1e-3
"""Smallest share of hidden tokens (BD3-LM, SDAR): the weight 1/t stays finite."""
Window = tuple[float, float]


def _windows() -> list[Window]:
    steps = [round(0.05 * step, 2) for step in range(21)]
    return [(LEAST, 1.0), *((max(low, LEAST), high) for low in steps for high in steps if 0.5 <= round(high - low, 2) <= 0.9)]


WINDOWS = _windows()
"""Ranges of t that a data-driven choice considers (BD3-LM): all of it, and those 0.5 … 0.9 wide in steps of 0.05."""


class BlockMask:
    """Which token lies in which block.

    Args:
        sizes: tokens of each block, in order.
    """

    def __init__(self, sizes: list[int]) -> None:
        counts = torch.tensor(sizes, device="cpu")
        of = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
        self._facts = Facts(torch.stack((of, counts[of], (counts.cumsum(0) - counts)[of])))
        self.count, self.n_tokens = len(sizes), len(of)

    def of(self, device: torch.device) -> Tensor:
        """Block of each token, `[N]`."""
        return self._facts.on(device)[0]

    @property
    def noise_size(self) -> int:
        """Numbers that a sample needs: a common one, one for each block, one for each token."""
        return 1 + self.count + self.n_tokens

    def spread(self, noise: Tensor) -> Tensor:
        """A uniform number for each block `[B, K]`, spread evenly over [0, 1) within a sample (antithetic).

        BD3-LM spreads over the whole batch; within a sample it does not depend on who else is in the batch.
        """
        strata = noise[:, 1 : 1 + self.count].argsort(dim=1).argsort(dim=1)
        return (noise[:, :1] + strata) / self.count

    def by_level(self, levels: Tensor, noise: Tensor) -> Tensor:
        """Hide each token with its block's probability `[B, K]`: bool `[B, N]`."""
        return noise[:, 1 + self.count :] < levels[:, self.of(noise.device)]

    def by_count(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Hide m of the k tokens of each block, m uniform on 1 … k: bool `[B, N]`, and the weights k/m of its tokens.

        The expectation is that of t uniform on (0, 1) with weight 1/t, since ∫ t^(m-1) (1-t)^(k-m) dt = (m-1)! (k-m)! / k!,
        but no draw is empty, and for k = 1 nothing is left to chance.
        """
        of, size, start = self._facts.on(noise.device)
        hidden = (1 + (self.spread(noise)[:, of] * size).long()).minimum(size)
        # Sorted by block, then by its number: a token's place in its block says whether it is among the first m.
        place = (of + noise[:, 1 + self.count :].double()).argsort(dim=1).argsort(dim=1) - start
        return place < hidden, size / hidden

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each block: `[B, N]` to `[B, K]`."""
        return values.new_zeros(len(values), self.count).index_add_(1, self.of(values.device), values)


def window_moments(levels: Tensor, nll: Tensor) -> Tensor:
    """How many blocks have t within each window, and the sums of their losses and of the squares: `[G, 3]` float64.

    Args:
        levels: t of each block, drawn from all of (0, 1].
        nll: loss of each block.
    """
    low, high = torch.tensor(WINDOWS, dtype=torch.float64, device=levels.device).unbind(1)
    inside = ((levels.flatten() >= low[:, None]) & (levels.flatten() <= high[:, None])).double()
    values = nll.flatten().double()
    return inside @ torch.stack((torch.ones_like(values), values, values.square()), dim=1)


def calmest_window(moments: Tensor) -> Tensor:
    """The window `[2]` in which the losses of blocks vary least, from `[G, 3]` of `window_moments`; no block: all of it."""
    count, total, squares = moments.unbind(1)
    variance = squares / count - (total / count).square()
    choice = variance.nan_to_num(nan=torch.inf).argmin()
    return torch.tensor(WINDOWS, device=moments.device)[choice]


def block_sizes(ends: tuple[int, ...]) -> list[int]:
    """Sizes from the numbers of tokens before each block and in all (`Plan.committed`)."""
    return [stop - start for start, stop in pairwise(ends)]
