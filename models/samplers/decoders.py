"""Who computes the logits of the next unit: with a KV cache, or (the slow twin) from scratch every time.

Shapes: `B` samples, `N` tokens of an image, `U` tokens of one unit, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..generators.base import Generator, StepwiseGenerator


class Decoder(Protocol):
    """Logits of the next unit, with and without the condition, for one chunk of samples."""

    codes: Tensor
    paired: bool

    @property
    def calls(self) -> int:
        """Passes of the network so far."""

    def resume(self, codes: Tensor, unit: int) -> None:
        """Begin with the units before `unit` of `codes [B, N]`, -1 where there is none."""

    def propose(self, unit: int) -> Tensor:
        """Conditional logits `[B, U, V]`; while paired `[2B, U, V]`, the unconditional ones last."""

    def refine(self, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """The same given a part of the unit's codes; see `StepwiseGenerator.refine`."""

    def commit(self, unit: int, values: Tensor) -> None:
        """Fix codes `[B, U]`."""

    def pair(self, unit: int) -> None:
        """From `unit` on compute the unconditional half too."""

    def unpair(self) -> None:
        """From here on do not compute it any more."""


class CachedDecoder:
    """Steps with a KV cache: each unit is computed once.

    Args:
        generator: in eval mode.
        condition: `[B, …]`.
        capacity: rows that may be needed at once.
        compile: see `Generator.begin`.
    """

    def __init__(self, generator: Generator, condition: Tensor, capacity: int, compile: bool) -> None:
        self.generator, self.condition, self.paired = generator, condition, False
        self.codes = condition.new_zeros(len(condition), generator.plan.n_tokens, dtype=torch.int64)
        self.capacity, self.compile, self.known = capacity, compile, 0
        self.state: Any = None

    def resume(self, codes: Tensor, unit: int) -> None:
        """Begin with the units before `unit` of `codes [B, N]`, which cost no steps of their own."""
        self.known = unit
        self.codes[:] = torch.where(codes >= 0, codes, 0)

    def pair(self, unit: int) -> None:
        """Add the unconditional rows; from the first unit on they simply begin together with the others."""
        null, self.paired = self.generator.null(self.condition), True
        if self.state is None:
            self._begin(torch.cat((self.condition, null)))
        else:
            self.generator.join(self.state, null, self.codes, unit)

    def unpair(self) -> None:
        """Keep the conditional rows only."""
        self.generator.keep(self.state, len(self.condition))
        self.paired = False

    def propose(self, unit: int) -> Tensor:
        """Logits of the unit's tokens from the cache of those before."""
        if self.state is None:
            self._begin(self.condition)
        return self.generator.propose(self.state, unit)

    def refine(self, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """The same given a part of the unit's codes."""
        if self.state is None:
            self._begin(self.condition)
        return _stepwise(self.generator).refine(self.state, unit, self._for_all_rows(filled), window)

    def commit(self, unit: int, values: Tensor) -> None:
        """Into the cache and the codes."""
        self.codes[:, self.generator.plan.columns(unit)] = values
        self.generator.commit(self.state, unit, self._for_all_rows(values))

    @property
    def calls(self) -> int:
        """Passes of the network so far."""
        return 0 if self.state is None else int(self.state.calls)

    def _for_all_rows(self, values: Tensor) -> Tensor:
        return values.repeat(2, 1) if self.paired else values

    def _begin(self, condition: Tensor) -> None:
        self.state = self.generator.begin(condition, capacity=self.capacity, compile=self.compile)
        self.generator.resume(self.state, self._for_all_rows(self.codes), self.known)


class UncachedDecoder:
    """The slow twin: a full pass for every unit. For tests and for measuring what the cache brings."""

    def __init__(self, generator: Generator, condition: Tensor) -> None:
        self.generator, self.condition, self.paired = generator, condition, False
        self.codes = condition.new_zeros(len(condition), generator.plan.n_tokens, dtype=torch.int64)
        self.rows, self.calls = condition, 0

    def resume(self, codes: Tensor, unit: int) -> None:
        """Begin with the units before `unit` of `codes [B, N]`."""
        self.codes[:] = torch.where(codes >= 0, codes, 0)

    def pair(self, unit: int) -> None:
        """Add the unconditional rows."""
        self.paired = True
        self.rows = torch.cat((self.condition, self.generator.null(self.condition)))

    def unpair(self) -> None:
        """Keep the conditional rows only."""
        self.rows, self.paired = self.condition, False

    def propose(self, unit: int) -> Tensor:
        """Logits of the unit's tokens from all codes so far."""
        self.calls += 1
        return self.generator.recompute(self._for_all_rows(self.codes), self.rows, unit)

    def refine(self, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """The same given a part of the unit's codes."""
        self.calls += 1
        codes, filled = self._for_all_rows(self.codes), self._for_all_rows(filled)
        return _stepwise(self.generator).refine_anew(codes, self.rows, unit, filled)

    def _for_all_rows(self, values: Tensor) -> Tensor:
        return values.repeat(len(self.rows) // len(self.condition), 1)

    def commit(self, unit: int, values: Tensor) -> None:
        """Into the codes."""
        self.codes[:, self.generator.plan.columns(unit)] = values


def _stepwise(generator: Generator) -> StepwiseGenerator:
    assert isinstance(generator, StepwiseGenerator)  # `inner_for` asks only those to go in steps
    return generator
