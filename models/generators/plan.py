"""The Plan: which token is revealed when, from what, at which place. Pure data; every mask follows from it.

Shapes: `N` tokens of an image, `S` slots of the network's sequence, `h` heads of one slot, `d` axes of a place.
A slot is one position of the sequence. Its unit is the step in which it is fed to the network, and so reveals the
tokens that it predicts. Slots that are fed before the first step (a text prefix but its last token) have negative units.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ..tokenizers.layout import TokenLayout

CacheMode = Literal["append_on_propose", "append_on_commit"]
NO_PLACE = -1
"""A slot's coordinate where it has no place."""


@dataclass(frozen=True)
class Plan:
    """A reveal order.

    Args:
        perm: `[N]` token ids (layout order) in the order in which they are revealed.
        unit: `[S]` step in which each slot is fed; never decreases along a stream.
        holds: `[S]` token whose code is the slot's input, -1 for a slot filled otherwise (class, filler, reconstruction).
        predicts: `[S, h]` tokens that the slot predicts, -1 for none.
        coords: `[S, d]` place of the slot for position encodings; negative: no place (prefix).
        grid: rows and columns of the tokens where they form one grid.
        stream: `[S]` 0 for a clean slot, 1 for a noisy one; empty when all are clean.
        cache_mode: the K/V of a unit are final once proposed, or only after a pass over its committed values.

    Raises:
        ValueError: the parts contradict each other, or a slot would see a token before that is revealed.
    """

    perm: tuple[int, ...]
    unit: tuple[int, ...]
    holds: tuple[int, ...]
    predicts: tuple[tuple[int, ...], ...]
    coords: tuple[tuple[int, ...], ...]
    grid: tuple[int, int] | None = None
    stream: tuple[int, ...] = ()
    cache_mode: CacheMode = "append_on_propose"

    def __post_init__(self) -> None:
        slots, tokens = len(self.unit), len(self.perm)
        if sorted(self.perm) != list(range(tokens)):
            raise ValueError("perm must hold every token id once")
        if {len(self.holds), len(self.predicts), len(self.coords), len(self.stream) or slots} != {slots}:
            raise ValueError(f"unit, holds, predicts, coords and stream must all describe {slots} slots")
        if any(np.diff(self._units[self._noisy == kind]).min(initial=0) < 0 for kind in (0, 1)):
            raise ValueError("units must not decrease along a stream; sort the slots by unit")
        if min(self.revealed_at) < 0:
            raise ValueError(f"token {self.revealed_at.index(-1)} is predicted by no slot")
        if any(np.diff([self.revealed_at[token] for token in self.perm]) < 0):
            raise ValueError("perm must list the tokens in the order of the units that reveal them")
        if self.cache_mode == "append_on_propose":
            self._check_causality()

    def _check_causality(self) -> None:
        for slot, token in enumerate(self.holds):
            if token >= 0 and self.revealed_at[token] >= self.unit[slot]:
                raise ValueError(f"slot {slot} of unit {self.unit[slot]} holds token {token}, which is not yet revealed")

    @cached_property
    def in_layout_order(self) -> bool:
        """Tokens are revealed in the order of the layout."""
        return self.perm == tuple(range(len(self.perm)))

    @property
    def n_tokens(self) -> int:
        """Number of tokens of an image."""
        return len(self.perm)

    @property
    def n_slots(self) -> int:
        """Length of the network's sequence."""
        return len(self.unit)

    @property
    def n_units(self) -> int:
        """Number of reveal steps; units are `0 … n_units-1`."""
        return max(self.unit) + 1

    @property
    def streams(self) -> int:
        """1, or 2 where clean and noisy slots stand side by side."""
        return 2 if any(self.stream) else 1

    @cached_property
    def shift(self) -> bool:
        """Slots predict another token than the one they hold (next-token), not their own (masked, next-scale)."""
        pairs = zip(self.holds, self.predicts, strict=True)
        return any(token >= 0 and max(heads) >= 0 and token not in heads for token, heads in pairs)

    @cached_property
    def revealed_at(self) -> tuple[int, ...]:
        """`[N]` the unit that reveals each token: the first one with a slot that predicts it."""
        first = [-1] * self.n_tokens
        for unit, heads in zip(self.unit, self.predicts, strict=True):
            for token in heads:
                if token >= 0 and (first[token] < 0 or unit < first[token]):
                    first[token] = unit
        return tuple(first)

    @cached_property
    def _tokens(self) -> tuple[tuple[int, ...], ...]:
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for token in self.perm:
            groups[self.revealed_at[token]].append(token)
        return tuple(map(tuple, groups))

    def tokens(self, unit: int) -> tuple[int, ...]:
        """Token ids (layout order) that `unit` reveals, in the order in which a generator proposes them."""
        return self._tokens[unit]

    @cached_property
    def _columns(self) -> tuple[slice | list[int], ...]:
        def run(tokens: tuple[int, ...]) -> slice | list[int]:
            straight = tokens == tuple(range(tokens[0], tokens[0] + len(tokens)))
            return slice(tokens[0], tokens[-1] + 1) if straight else list(tokens)

        return tuple(run(tokens) if tokens else [] for tokens in self._tokens)

    def columns(self, unit: int) -> slice | list[int]:
        """`tokens(unit)` as an index into codes `[B, N]`; a slice, which copies nothing, where they are consecutive."""
        return self._columns[unit]

    @cached_property
    def _slots(self) -> tuple[tuple[int, ...], ...]:
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for slot, unit in enumerate(self.unit):
            if unit >= 0:
                groups[unit].append(slot)
        return tuple(map(tuple, groups))

    def slots(self, unit: int) -> tuple[int, ...]:
        """Slots that are fed in `unit`."""
        return self._slots[unit]

    @cached_property
    def _spans(self) -> tuple[slice, ...]:
        ends = np.cumsum([self.prefix, *map(len, self._slots)]).tolist()
        return (slice(0, ends[1]), *(slice(start, stop) for start, stop in pairwise(ends[1:])))

    def span(self, unit: int) -> slice:
        """The slots of `unit` in a plan of one stream; those of the first unit with the prefix before them."""
        return self._spans[unit]

    @cached_property
    def prefix(self) -> int:
        """Number of slots that are fed before the first unit: a text, but its last token."""
        return sum(unit < 0 for unit in self.unit)

    @cached_property
    def committed(self) -> tuple[int, ...]:
        """`[n_units + 1]` number of tokens revealed before each unit; the last entry is `N`."""
        return tuple(int(count) for count in np.cumsum([0, *map(len, self._tokens)]))

    @property
    def _units(self) -> np.ndarray:
        return np.asarray(self.unit)

    @property
    def _noisy(self) -> np.ndarray:
        return np.asarray(self.stream or (0,) * self.n_slots)

    @cached_property
    def causal(self) -> bool:
        """The mask is the plain lower triangle: every slot is a unit of its own."""
        return self.streams == 1 and all(np.diff(self._units) > 0)

    @cached_property
    def _visible(self) -> Tensor:
        unit, noisy = torch.from_numpy(self._units), torch.from_numpy(self._noisy).bool()
        with torch.inference_mode(False):  # kept for training, where a tensor born in inference mode is refused
            return allow(unit[:, None], unit[None, :], noisy[:, None], noisy[None, :])

    def check(self, layout: TokenLayout) -> None:
        """Make sure that this plan reveals the tokens of `layout`.

        Raises:
            UserError: another number of tokens, or another grid.
        """
        theirs = next((stream.grid for stream in layout.streams if len(layout.streams) == 1), None)
        fix = "give the generator the grid or n_tokens of the tokenizer"
        if layout.total_tokens != self.n_tokens:
            raise UserError(
                f"plan of {self.n_tokens} tokens, but the tokenizer makes {layout.total_tokens}", where="generator", fix=fix
            )
        if self.grid and theirs and self.grid != theirs:
            raise UserError(f"plan of a grid {self.grid}, but the tokenizer's is {theirs}", where="generator", fix=fix)


def allow(query: Tensor, key: Tensor, noisy_query: Tensor, noisy_key: Tensor) -> Tensor:
    """The one rule of every mask, elementwise: may a query of this unit see a key of that unit?

    A clean key is visible iff `unit[k] <= unit[q]` (`<` for a noisy query); a noisy key only to noisy queries of its unit.
    """
    clean_key = (key < query) | ((key == query) & ~noisy_query)
    return torch.where(noisy_key, noisy_query & (key == query), clean_key)


@functools.lru_cache(maxsize=64)
def block_mask(plan: Plan, slots: int, device: torch.device) -> Any:
    """`visible` of the first `slots` slots as a BlockMask of FlexAttention, by the same rule. Made once per plan and device."""
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):  # kept for training, as above
        unit = torch.from_numpy(plan._units).to(device)
        noisy = torch.from_numpy(plan._noisy).bool().to(device)

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return allow(unit[query], unit[key], noisy[query], noisy[key])

        return create_block_mask(rule, None, None, slots, slots, device=device)


def visible(plan: Plan) -> Tensor:
    """Dense mask `[S, S]`, bool, on the CPU: query slot (row) may see key slot (column). Made once per plan."""
    return plan._visible
