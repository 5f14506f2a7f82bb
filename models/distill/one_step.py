"""The one-step generator of Distilled Decoding 2 (arXiv:2510.21003): a diffusion model that takes a single step for all tokens.

Shapes: `B` batch, `N` tokens of an image, `D` code width, `V` codebook.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ..generators.static_step import compiled
from ..samplers.decode import Tally
from .ar_diffusion import ARDiffusion
from .codebook import nearest
from .dd2 import refine
from .distilled import Ask


class OneStepGenerator(ARDiffusion):
    """An `ARDiffusion` in its third role; its weights are those of the first to begin with.

    Its tokens become their nearest codes, or stay where they land behind `split`: both are near to each other once it is
    trained, since the distribution that it learns is one of codes.
    """

    kind: ClassVar[str] = "a one-step generator of Distilled Decoding 2"
    knows: ClassVar[tuple[str, ...]] = ("split", "redraw", "compile")

    def check(self, ask: Ask) -> None:
        """See `Distilled.check`."""
        super().check(ask)
        if ask.redraw is not None and ask.split is not None:
            raise UserError(
                "with redraw every token becomes a code, which is what the teacher reads",
                where="student.split",
                fix="leave it out",
            )

    def _draw(self, noise: Tensor, condition: Tensor, codebook: Tensor, ask: Ask, ids: Tensor, cost: Tally) -> Tensor:
        vectors = (compiled(_generate) if ask.compile else _generate)(self, noise, condition)
        cost.add(1, 1)
        if ask.redraw is not None and ask.teacher is not None:
            codes = refine(ask.teacher, vectors, condition, codebook, ask.redraw, ids=ids, tally=cost)
            return F.embedding(codes, codebook)
        snapped = self.plan.committed[self.plan.n_units if ask.split is None else ask.split]
        codes = nearest(vectors[:, :snapped], codebook)
        return torch.cat((F.embedding(codes, codebook), vectors[:, snapped:]), dim=1)


def _generate(model: ARDiffusion, noise: Tensor, condition: Tensor) -> Tensor:
    return model.generate(noise, condition)
