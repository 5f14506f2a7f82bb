"""One-step students (Distilled Decoding 1, arXiv:2412.17153): networks that read noise and give all tokens at once.

Shapes: `B` batch, `N` tokens of an image, `S = 1 + N` slots (the class, then the tokens), `D` code width, `C` width,
`V` vocabulary. A point of a trajectory holds code vectors in its first tokens and noise in the others, `[B, N, D]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..generators.plan import Plan
from ..generators.planned import Facts, PlannedGenerator
from ..layers import modulate
from ..samplers.decode import Tally
from . import dd1
from .distilled import Ask, Distilled

NOISE, DATA = 0, 1
"""Rows of the flag embedding."""


class Prediction(NamedTuple):
    """What a student says of every token: `logits [B, N, V]`, and `vectors [B, N, D]` from its other head."""

    logits: Tensor
    vectors: Tensor


class Read(NamedTuple):
    """What a student computed of a point before its heads.

    Args:
        states: `[B, S, C]`.
        label: class embeddings `[B, 1, C]`, for the head of vectors.
        modulation: `[B, 1, C]`, of the norm before the logits; `None`: it has none.
    """

    states: Tensor
    label: Tensor
    modulation: Tensor | None


class VectorHead(nn.Module):
    """Hidden states to vectors: LayerNorm without weights, scale and shift of the class, linear (PixArt's final layer).

    Scale and shift are two learned vectors, to both of which the class embedding is added.

    Args:
        dim: width `C`.
        embed_dim: code width `D`.
    """

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(2, dim) * dim**-0.5)
        self.out = nn.Linear(dim, embed_dim)

    def forward(self, hidden: Tensor, label: Tensor) -> Tensor:
        """Vectors `[B, L, D]` of hidden states `[B, L, C]` and class embeddings `[B, 1, C]`."""
        shift, scale = (self.offset + label).chunk(2, dim=1)
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return self.out(modulate(normed, scale, shift))


class Student(Distilled):
    """Reads a point of a trajectory at the tokens' own slots and predicts its end by two heads.

    A flag embedding tells noise from data. A token sees the class, the units before its own, and itself: what the map that
    it learns depends on. Input and output stand at the same slot, unlike the teacher's.

    Args:
        teacher: the network whose parts, and later weights, it takes over.
        embed_dim: code width `D`.
        timesteps: numbers of finished units from which it learns to go to the end, 0 the first.
        split: the tokens of the first so many units are taken from the logits and are codes, the others from the other head.

    Raises:
        ValueError: timesteps that do not rise from 0 within the units, or a split beyond them.
    """

    kind: ClassVar[str] = "a student of Distilled Decoding 1"
    knows: ClassVar[tuple[str, ...]] = ("steps", "split", "keep", "compile")
    head: nn.Module

    def __init__(self, teacher: PlannedGenerator, embed_dim: int, timesteps: Sequence[int], split: int) -> None:
        super().__init__()
        self.plan, self.vocab_size, self.num_classes = teacher.plan, teacher.vocab_size, teacher.num_classes
        self.embed_dim, self.timesteps, self.split = embed_dim, tuple(timesteps), split
        units = self.plan.n_units
        rising = list(self.timesteps) == sorted(set(self.timesteps))
        if not self.timesteps or self.timesteps[0] != 0 or not rising or self.timesteps[-1] >= units:
            raise ValueError(f"timesteps {list(self.timesteps)} of {units} units; give 0 and rising numbers below {units}")
        if not 0 <= split <= units:
            raise ValueError(f"split {split} of {units} units; choose 0 to {units}")
        dim = teacher.transformer.config.dim
        self.transformer = teacher.transformer
        self.flags = nn.Embedding(2, dim)
        self.vector_head = VectorHead(dim, embed_dim)
        self._mask = Facts(_sees(self.plan))
        self._place = Facts(torch.arange(-1, self.plan.n_tokens, device="cpu"))

    def forward(self, vectors: Tensor, condition: Tensor, done: Tensor) -> Prediction:
        """The end of the trajectory by both heads, of every token: what is trained.

        Args:
            vectors: `[B, N, D]`, a point of it.
            condition: class ids `[B]`.
            done: `[B]` int64, number of its first tokens that are data.
        """
        read, every = self.read(vectors, condition, done), slice(0, self.plan.n_tokens)
        return Prediction(self.logits(read, every), self.vectors(read, every))

    @abstractmethod
    def read(self, vectors: Tensor, condition: Tensor, done: Tensor) -> Read:
        """All but the heads; see `forward`."""

    def logits(self, read: Read, tokens: slice) -> Tensor:
        """Logits `[B, n, V]` of some tokens."""
        return self.head(self.transformer.finish(_slots(read, tokens), read.modulation))

    def vectors(self, read: Read, tokens: slice) -> Tensor:
        """Vectors `[B, n, D]` of some tokens."""
        return self.vector_head(_slots(read, tokens), read.label)

    @abstractmethod
    def weights_from(self, teacher: nn.Module) -> dict[str, Tensor]:
        """Weights to begin with: the teacher's where it has them, else this one's own.

        Raises:
            UserError: the teacher has another shape than the one it was built for.
        """

    def flag_rows(self, done: Tensor) -> Tensor:
        """Rows `[B, S]` of the flag embedding; the class counts as data."""
        place = self._place.on(done.device)
        return torch.where(place < done[:, None], DATA, NOISE)

    def pending(self, done: Tensor) -> Tensor:
        """Which tokens are still noise, bool `[B, N]`."""
        return self._place.on(done.device)[1:] >= done[:, None]

    def tokens_in(self, units: int) -> int:
        """Tokens of the first so many units."""
        return self.plan.committed[units]

    def check(self, ask: Ask) -> None:
        """See `Distilled.check`; its steps are those that it was trained for."""
        super().check(ask)
        for step in ask.steps or ():
            self.check_step(step)

    def _draw(self, noise: Tensor, condition: Tensor, codebook: Tensor, ask: Ask, ids: Tensor, cost: Tally) -> Tensor:
        given = (self, codebook, condition, noise)
        options: dict[str, Any] = {"split": ask.split, "compile": bool(ask.compile), "tally": cost}
        if ask.keep is None or ask.teacher is None:
            return dd1.generate(*given, steps=ask.steps, **options)
        step = ask.steps[-1] if ask.steps else None
        return dd1.assisted(*given, helper=ask.teacher, keep=ask.keep, step=step, ids=ids, **options)

    def check_step(self, units: int) -> None:
        """Refuse a step that begins where it never learned to begin.

        Raises:
            UserError: it is none of `timesteps`.
        """
        if units not in self.timesteps:
            trained = ", ".join(map(str, self.timesteps))
            raise UserError(
                f"a step from {units} finished units, which this student was not trained for", where="student.steps",
                fix=f"use steps from {trained}, or train one with timesteps=[0,{units}]",
            )  # fmt: skip

    def _carried(self, teacher: nn.Module, renamed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Own weights, replaced by `renamed` and by those that the teacher has under the same name."""
        own, theirs = self.state_dict(), teacher.state_dict()
        shared = {name: value for name, value in theirs.items() if name in own}
        found = {**own, **shared, **renamed}
        if wrong := [name for name, value in found.items() if value.shape != own[name].shape]:
            raise UserError(
                f"{wrong[0]} of this teacher is {tuple(found[wrong[0]].shape)}, the student's {tuple(own[wrong[0]].shape)}",
                where="teacher",
                fix="build the student from the teacher's own config",
            )
        return found


def check_teacher_of(student: type[Student], kind: type[nn.Module], teacher: object) -> None:
    """A student is built from one kind of teacher.

    Raises:
        ValueError: this is another.
    """
    if not isinstance(teacher, kind):
        raise ValueError(f"a {student.__name__} is made from a {kind.__name__}, not from a {type(teacher).__name__}")


def _slots(read: Read, tokens: slice) -> Tensor:
    """States of tokens; the class has the slot before the first."""
    return read.states[:, 1 + tokens.start : 1 + tokens.stop]


def _sees(plan: Plan) -> Tensor:
    """Mask `[S, S]`: a slot sees the class, tokens of earlier units, and itself."""
    unit = torch.tensor([-1, *plan.revealed_at], device="cpu")
    return (unit[None] < unit[:, None]) | torch.eye(len(unit), dtype=torch.bool, device="cpu")
