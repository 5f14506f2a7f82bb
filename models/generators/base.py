"""The Generator interface: a model of codes that reveals them unit by unit, in the order of its Plan.

Shapes: `B` batch, `N` tokens of an image, `U` tokens of one unit, `V` vocabulary.
A condition is what one sample is conditioned on: class ids `[B]` int64, where `null_class` stands for "no condition".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..tokenizers.base import Tokenizer
from .plan import Plan


class Generator(nn.Module, ABC):
    """An autoregressive model over the units of a Plan."""

    plan: Plan
    vocab_size: int
    num_classes: int
    needs_tokenizer = False
    """It looks at partial reconstructions: see `bind`."""

    @property
    def null_class(self) -> int:
        """The class id that means "no class", used for classifier-free guidance."""
        return self.num_classes

    def bind(self, tokenizer: Tokenizer) -> None:
        """Meet the tokenizer whose codes it speaks, frozen and on the same device; before anything else is asked of it.

        Only a generator that looks at partial reconstructions keeps it, and not as a part of itself.

        Raises:
            UserError: its codes are not this generator's.
        """

    @abstractmethod
    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits `[B, N, V]`: position n (layout order) predicts code n from the units before it."""

    @abstractmethod
    def loss(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Scalar losses by name for codes `[B, N]`; `"loss"` is the one to minimise."""

    def forward(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Same as `loss`: the entry that wrappers of distributed training see."""
        return self.loss(codes, condition)

    def recompute(self, codes: Tensor, condition: Tensor, unit: int) -> Tensor:
        """Logits `[B, U, V]` of `unit` from the codes alone, without a cache: the slow twin of `propose`."""
        return self.logits(codes, condition)[:, self.plan.columns(unit)]

    def anneal(self, progress: float) -> None:
        """Be told, before every training step, what share of the run is done, in [0, 1]."""

    @abstractmethod
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> Any:
        """Start to generate for conditions `[B]`: allocates the KV cache and returns the state.

        Args:
            condition: one for each row.
            capacity: rows to allocate, for rows that `join` later; `B` when not given.
            compile: run the repeated step through `torch.compile`.
        """

    @abstractmethod
    def propose(self, state: Any, unit: int) -> Tensor:
        """Logits `[B, U, V]` of the tokens of `unit` (order of `plan.tokens`), given the units committed before it."""

    @abstractmethod
    def commit(self, state: Any, unit: int, values: Tensor) -> None:
        """Fix the codes `[B, U]` of `unit`; later proposals see them."""

    @abstractmethod
    def join(self, state: Any, condition: Tensor, codes: Tensor, unit: int) -> None:
        """Add rows behind the present ones, as if they had been there from the start: one pass over the units before `unit`.

        Args:
            state: with spare capacity.
            condition: `[B']` of the new rows.
            codes: `[B', N]`; tokens revealed before `unit` are read.
            unit: the one to be proposed next.
        """

    @abstractmethod
    def keep(self, state: Any, rows: int) -> None:
        """Forget all but the first `rows` rows."""
