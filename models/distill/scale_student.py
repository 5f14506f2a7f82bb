"""The one-step student of a next-scale teacher: blind between tokens of one scale (VAR's in DD1).

Shapes: `B` batch, `N` tokens of all scales, `S = 1 + N` slots, `D` code width, `C` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ranges import NonNegativeInt
from ..attention import Context
from ..generators.next_scale import NextScale, ScaleGenerator
from ..generators.planned import Facts
from .student import Read, Student, check_teacher_of


class ScaleStudent(Student):
    """`NextScale` whose slots hold the vectors of their own tokens, behind a slot of the class that is a level of its own.

    A vector goes through the teacher's layer for reconstructions as it is: nothing is accumulated. The flag is added at the
    input, after the attention of every block and before both heads, each time through a linear layer of its own but the first.

    Args:
        teacher: a `NextScale`; its parts become this network's.
        timesteps: see `Student`; a unit is one scale.
        split: see `Student`; DD1: 5 of 10 scales (VAR-d16), 4 (d20, d24).
        flag_layers: the linear layers; false: the flag is added as it is.

    Raises:
        ValueError: another teacher, or what `Student` refuses.
    """

    undecayed = (*ScaleGenerator.undecayed, "flags.weight")

    def __init__(
        self, teacher: nn.Module, timesteps: Sequence[NonNegativeInt], split: NonNegativeInt, flag_layers: bool = True
    ) -> None:
        check_teacher_of(type(self), NextScale, teacher)
        assert isinstance(teacher, NextScale)
        super().__init__(teacher, teacher.embed_dim, timesteps, split)
        self.classes, self.embed, self.head = teacher.classes, teacher.embed, teacher.head
        dim, layers = teacher.transformer.config.dim, teacher.transformer.config.layers
        self.start = nn.Parameter(torch.empty(1, dim))
        self.positions = nn.Parameter(torch.empty(1 + self.plan.n_tokens, dim))
        self.levels = nn.Embedding(1 + self.plan.n_units, dim)
        self.flag_layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers + 1 if flag_layers else 0))
        self._level_of = Facts(torch.tensor([0, *(1 + unit for unit in self.plan.unit)], device="cpu"))
        self._init_weights(teacher.initial_std)

    @torch.no_grad()
    def _init_weights(self, std: float) -> None:
        fresh = (self.start, self.positions, self.levels.weight, self.flags.weight, self.vector_head.out.weight)
        for weight in fresh:
            nn.init.trunc_normal_(weight, std=std)
        nn.init.zeros_(self.vector_head.out.bias)
        for layer in self.flag_layers.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def read(self, vectors: Tensor, condition: Tensor, done: Tensor) -> Read:
        """See `Student.read`."""
        label = self.classes(condition)[:, None]
        x = torch.cat((label + self.start, self.embed(vectors.to(self.embed.weight.dtype))), dim=1)
        flags = self.flags(self.flag_rows(done))
        x = x + self.levels(self._level_of.on(x.device)) + self.positions + flags
        context, signal = Context(mask=self._mask.on(x.device)), self.transformer.signal(label)
        for layer, block in enumerate(self.transformer.blocks):
            x = block(x, context, layer, signal, self._flag(flags, layer))
        return Read(x + self._flag(flags, -1), label, label)

    def _flag(self, flags: Tensor, layer: int) -> Tensor:
        return self.flag_layers[layer](flags) if len(self.flag_layers) else flags

    def weights_from(self, teacher: nn.Module) -> dict[str, Tensor]:
        """The teacher's; the class keeps its first place and level, those of the first scale's tokens are new."""
        theirs, first = teacher.state_dict(), self.tokens_in(1)
        positions, levels = self.positions.detach().clone(), self.levels.weight.detach().clone()
        positions[0], positions[1 + first :] = theirs["positions"][0], theirs["positions"][first:]
        levels[0], levels[2:] = theirs["levels.weight"][0], theirs["levels.weight"][1:]
        return self._carried(teacher, {"start": theirs["start"][:1], "positions": positions, "levels.weight": levels})
