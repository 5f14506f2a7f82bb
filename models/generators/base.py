"""The Generator interface: a model of codes that reveals them unit by unit, in the order of its Plan.

Shapes: `B` batch, `N` tokens of an image, `U` tokens of one unit, `V` vocabulary.
A condition is one tensor of `B` rows: class ids `[B]` int64, where `null_class` stands for "no class", or texts
(`conditions.py`). Whoever handles conditions may index, join and double them, and asks `null` for "no condition".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..kernels import Kernel
from ..tokenizers.base import Tokenizer
from .conditions import TextCondition
from .plan import Plan


class Generator(nn.Module, ABC):
    """An autoregressive model over the units of a Plan."""

    plan: Plan
    vocab_size: int
    num_classes: int
    needs_tokenizer = False
    """It looks at partial reconstructions: see `bind`."""
    noise_size = 0
    """Numbers in [0, 1) that `loss` takes for each sample, by which it draws what it hides; 0: it hides nothing at random."""
    attention: Kernel = "sdpa"
    """The kernel of its attention, set by whoever runs it (see `kernels.choose`)."""
    exact = True
    """`token_nll` is the likelihood; else a bound that depends on the noise."""

    @property
    def null_class(self) -> int:
        """The class id that means "no class", used for classifier-free guidance."""
        return self.num_classes

    @property
    def text(self) -> TextCondition | None:
        """How it reads texts; `None`: it is conditioned on classes."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """The condition of the same rows that means "no condition"."""
        return torch.full_like(condition, self.null_class)

    def check_condition(self, condition: Tensor) -> None:
        """Make sure that this generator knows the conditions `[B, …]`.

        Raises:
            UserError: it does not.
        """
        if condition.ndim != 1 or condition.is_floating_point():
            raise UserError("texts for a generator of classes", where="condition", fix="give classes instead of prompts")
        if len(condition) and not 0 <= int(condition.min()) <= int(condition.max()) <= self.null_class:
            raise UserError(
                f"class ids {int(condition.min())} … {int(condition.max())} asked for",
                where="condition",
                fix=f"this generator knows 0 … {self.num_classes - 1}, and {self.null_class} for no class",
            )

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
    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Scalar losses by name for codes `[B, N]`; `"loss"` is the one to minimise.

        Args:
            codes: `[B, N]`.
            condition: `[B, …]`.
            noise: `[B, noise_size]` in [0, 1); `None`: drawn here.
        """

    def forward(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None, each: bool = False) -> dict[str, Tensor]:
        """Same as `loss`, or with `each` as `token_nll` (`nll`): the entry that wrappers of distributed training see."""
        return {"nll": self.token_nll(codes, condition, noise)} if each else self.loss(codes, condition, noise)

    def token_nll(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """Negative log-likelihood `[B, N]` of each code, nats; where it is not `exact`, an unbiased draw of an upper bound."""
        return F.cross_entropy(self.logits(codes, condition).float().transpose(1, 2), codes.long(), reduction="none")

    def weights_from(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights of a trained model as this one's, by name: of a family that it can start from, or as they are."""
        return model.state_dict()

    def recompute(self, codes: Tensor, condition: Tensor, unit: int) -> Tensor:
        """Logits `[B, U, V]` of `unit` from the codes alone, without a cache: the slow twin of `propose`."""
        return self.logits(codes, condition)[:, self.plan.columns(unit)]

    def anneal(self, progress: float) -> None:
        """Be told, before every training step, what share of the run is done, in [0, 1]."""

    @abstractmethod
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> Any:
        """Start to generate for conditions `[B, …]`: allocates the KV cache and returns the state.

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
            condition: `[B', …]` of the new rows.
            codes: `[B', N]`; tokens revealed before `unit` are read.
            unit: the one to be proposed next.
        """

    def resume(self, state: Any, codes: Tensor, unit: int) -> None:
        """Take the units before `unit` of `codes [B, N]` as committed, right after `begin`: as if they had been drawn."""
        for earlier in range(unit):
            self.propose(state, earlier)
            self.commit(state, earlier, codes[:, self.plan.columns(earlier)])

    @abstractmethod
    def keep(self, state: Any, rows: int) -> None:
        """Forget all but the first `rows` rows."""


class StepwiseGenerator(Generator):
    """A generator that fills a unit in several steps: each sees what the steps before it filled in, and writes nothing."""

    @abstractmethod
    def refine(self, state: Any, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """Logits `[B, U, V]` of the tokens of `unit`, given the units committed before it and a part of its own codes.

        Args:
            state: of the generation.
            unit: the next one.
            filled: `[B, U]` codes in the order of `plan.tokens`, -1 where none is chosen yet.
            window: only these tokens are computed anew, `[B, W, V]`; keys and values of the others are those of the last call.
        """

    @abstractmethod
    def refine_anew(self, codes: Tensor, condition: Tensor, unit: int, filled: Tensor) -> Tensor:
        """The same from the codes alone, without a cache: the slow twin of `refine`."""
