"""The one door to networks distilled from a generator: noise and class in, the vectors of an image out.

Shapes: `B` batch, `N` tokens of an image, `D` code width, `V` codebook. Units are those of the teacher's plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..generators.base import Generator
from ..generators.plan import Plan
from ..samplers.decode import Tally
from ..samplers.guidance import Varying
from ..tokenizers.base import Tokenizer

HELPED = ("keep", "redraw")
"""Parts of an `Ask` for which a teacher is needed."""


@dataclass(frozen=True)
class Helper:
    """A teacher that draws some of the units.

    Args:
        generator: of the same plan.
        seed: of its draws.
        sampling: its guidance, truncation, …: see `samplers.decode.sample`.
    """

    generator: Generator
    seed: int
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """How a distilled network is asked. What is `None` is left to the network, which knows some of these and refuses others.

    Args:
        steps: finished units at which a student's passes begin.
        split: tokens of the first so many units become codes.
        keep: units that stay of a student's first pass; its teacher draws those up to the last step.
        redraw: last units that the teacher draws anew.
        euler: Euler steps of each token, a number or a schedule over the image.
        compile: run the pass through `torch.compile`: worth it for many samples of one batch size.
        teacher: who helps with `keep` and `redraw`.
    """

    steps: Sequence[int] | None = None
    split: int | None = None
    keep: int | None = None
    redraw: int | None = None
    euler: Varying | None = None
    compile: bool | None = None
    teacher: Helper | None = None


def check_help(ask: Ask) -> None:
    """Make sure that there is a teacher where one is needed.

    Raises:
        UserError: there is none.
    """
    asked = [name for name in HELPED if getattr(ask, name) is not None]
    if asked and ask.teacher is None:
        raise UserError("needs the teacher", where=f"student.{asked[0]}", fix="give its run with student.teacher=…")


class Distilled(nn.Module, ABC):
    """A network whose images are a function of noise and class, apart from what a teacher draws for it.

    A kind says what it is called, which parts of an `Ask` it knows, and sets `plan`, `num_classes` and `embed_dim`.
    """

    kind: ClassVar[str]
    knows: ClassVar[tuple[str, ...]]
    plan: Plan
    num_classes: int
    embed_dim: int

    def bind(self, tokenizer: Tokenizer) -> None:
        """Take what it needs of the tokenizer whose codes it speaks."""

    def check(self, ask: Ask) -> None:
        """Make sure that it can be asked so.

        Raises:
            UserError: an option of another kind, or one out of range.
        """
        asked = [field.name for field in fields(ask) if field.name != "teacher" and getattr(ask, field.name) is not None]
        for name in asked:
            if name not in self.knows:
                known = ", ".join(f"student.{known}" for known in self.knows)
                raise UserError(f"{self.kind} knows no such thing", where=f"student.{name}", fix=f"it has {known}")
        if ask.split is not None and ask.split > self.plan.n_units:
            raise UserError(
                f"{ask.split} of {self.plan.n_units} units", where="student.split", fix=f"choose 0 to {self.plan.n_units}"
            )

    @torch.no_grad()
    def draw(
        self, noise: Tensor, condition: Tensor, codebook: Tensor, ask: Ask, ids: Tensor, tally: Tally | None = None
    ) -> Tensor:
        """Vectors `[B, N, D]` of images, of which some or all are codes.

        Args:
            noise: `[B, N, D]`, in units of the codebook.
            condition: class ids `[B]`.
            codebook: `[V, D]`.
            ask: how.
            ids: `[B]` numbers of the samples, on which a teacher's draws depend.
            tally: is told what it cost, as one batch.

        Raises:
            UserError: see `check` and `check_help`.
        """
        self.check(ask)
        check_help(ask)
        cost = Tally()
        found = self._draw(noise, condition, codebook, ask, ids, cost)
        if tally is not None:
            tally.add(cost.calls, cost.evaluations, cost.depth)
        return found

    @abstractmethod
    def _draw(self, noise: Tensor, condition: Tensor, codebook: Tensor, ask: Ask, ids: Tensor, cost: Tally) -> Tensor:
        """See `draw`; `cost` is of this batch alone."""
