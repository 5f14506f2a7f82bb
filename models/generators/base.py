"""The Generator interface: a model of codes that reveals them unit by unit, in the order of its Plan.

Shapes: `B` batch, `N` tokens of an image, `U` slots of one unit, `V` vocabulary.
A condition is what one sample is conditioned on: class ids `[B]` int64, where `null_class` stands for "no condition".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from .plan import Plan


class Generator(nn.Module, ABC):
    """An autoregressive model over the units of a Plan."""

    plan: Plan
    vocab_size: int
    num_classes: int

    @property
    def null_class(self) -> int:
        """The class id that means "no class", used for classifier-free guidance."""
        return self.num_classes

    @abstractmethod
    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits `[B, N, V]`: position n (layout order) predicts code n from the units before it."""

    @abstractmethod
    def loss(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Scalar losses by name for codes `[B, N]`; `"loss"` is the one to minimise."""

    def forward(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Same as `loss`: the entry that wrappers of distributed training see."""
        return self.loss(codes, condition)

    @abstractmethod
    def begin(self, condition: Tensor) -> Any:
        """Start to generate for conditions `[B]`: allocates the KV cache and returns the state."""

    @abstractmethod
    def propose(self, state: Any, unit: int) -> Tensor:
        """Logits `[B, U, V]` of the slots of `unit`, given the units committed before it."""

    @abstractmethod
    def commit(self, state: Any, unit: int, values: Tensor) -> None:
        """Fix the codes `[B, U]` of `unit`; later proposals see them."""
