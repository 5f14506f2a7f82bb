"""The one-step student of a next-token teacher: causal, its input a vector in the place of a code (LlamaGen's in DD1).

Shapes: `B` batch, `N` tokens of an image, `S = 1 + N` slots, `D` code width, `C` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import NonNegativeInt, PositiveInt
from ..attention import Context
from ..generators.next_token import NextToken
from ..layers import init_normal
from .student import Read, Student, check_teacher_of


class TokenStudent(Student):
    """`NextToken` with a linear layer for its table of tokens, a flag added at the input, and a second head.

    Args:
        teacher: a `NextToken` of classes; its parts become this network's.
        embed_dim: code width `D`.
        timesteps: see `Student`; a unit is one token.
        split: see `Student`; DD1: 80 of 256 tokens (LlamaGen-B), 130 (L).

    Raises:
        ValueError: another teacher, or what `Student` refuses.
    """

    def __init__(
        self, teacher: nn.Module, embed_dim: PositiveInt, timesteps: Sequence[NonNegativeInt], split: NonNegativeInt
    ) -> None:
        check_teacher_of(type(self), NextToken, teacher)
        assert isinstance(teacher, NextToken)
        if teacher.classes is None:
            raise ValueError("a teacher of texts has no one-step student; take one of classes")
        super().__init__(teacher, embed_dim, timesteps, split)
        self.token_dropout, self._rotary = teacher.token_dropout, teacher._rotary
        self.classes, self.head, self.positions = teacher.classes, teacher.head, teacher.positions
        self.embed = nn.Linear(embed_dim, teacher.transformer.config.dim)
        for fresh in (self.embed, self.flags, self.vector_head):
            init_normal(fresh)

    def read(self, vectors: Tensor, condition: Tensor, done: Tensor) -> Read:
        """See `Student.read`."""
        label = self.classes(condition)[:, None]
        x = torch.cat((label, self.embed(vectors.to(self.embed.weight.dtype))), dim=1) + self.flags(self.flag_rows(done))
        if self.positions is not None:
            x = x + self.positions
        x = F.dropout(x, self.token_dropout, self.training)
        modulation = None
        if self.transformer.final is not None:
            modulation = label if self.positions is None else label + self.positions[:1]
        rope = None if self._rotary is None else self._rotary.on(x.device)
        blocks = range(len(self.transformer.blocks))
        hidden = self.transformer.through(x, Context(rope, causal=True), blocks, self.transformer.signal(modulation))
        return Read(hidden, label, modulation)

    def weights_from(self, teacher: nn.Module) -> dict[str, Tensor]:
        """The teacher's, except for the input layer, the flags and the second head."""
        return self._carried(teacher, {})
