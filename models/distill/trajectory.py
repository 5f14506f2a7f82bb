"""Trajectories of a teacher from noise to tokens, and its distributions where the tokens are known.

Shapes: `B` batch, `N` tokens of an image, `D` code width, `V` vocabulary.
Token i of a trajectory is `T(eps_i; p(· | tokens before))`: all of it follows from the noise `[B, N, D]`. Guidance,
temperature and truncation are the teacher's own, baked into p; a student of it needs none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..generators.base import Generator, StepwiseGenerator
from ..samplers.decode import Choices, sample
from ..samplers.guidance import OFF, combine
from .flow_map import TokenMap


def check_teacher(teacher: Generator) -> None:
    """Make sure that each of its tokens depends on nothing but the units before its own.

    Raises:
        UserError: it reveals a unit in several steps.
    """
    if isinstance(teacher, StepwiseGenerator):
        raise UserError(
            f"a {type(teacher).__name__} reveals a block in several steps: its tokens are no function of noise alone",
            where="teacher",
            fix="distil a next-token or next-scale generator",
        )


def follow(teacher: Generator, condition: Tensor, noise: Tensor, token_map: TokenMap, **sampling: Any) -> Tensor:
    """The tokens `[B, N]` at the end of the trajectories that begin with `noise`.

    Args:
        teacher: any whose units are revealed at once.
        condition: `[B, …]`.
        noise: `[B, N, D]`, in units of the codebook.
        token_map: over the teacher's codebook.
        sampling: of `samplers.decode.sample`: guidance, temperature, top_k, top_p; `given` codes restart a trajectory
            in its middle.

    Raises:
        UserError: a teacher whose units are revealed in steps, or choices out of range.
    """
    check_teacher(teacher)

    def transport(logits: Tensor, rows: slice, columns: slice | list[int]) -> Tensor:
        return token_map(noise[rows][:, columns].to(logits.device), logits)

    return sample(teacher, condition, seed=0, transport=transport, **sampling)


@torch.no_grad()
def distributions(teacher: Generator, codes: Tensor, condition: Tensor, choices: Choices) -> Tensor:
    """Logits `[B, N, V]` of what each token is drawn from given the true ones before it, -inf where it cannot be drawn.

    Args:
        teacher: in eval mode.
        codes: `[B, N]`.
        condition: `[B, …]`.
        choices: guidance, temperature, truncation (`samplers.decode.choices_for`).
    """
    conditional = teacher.logits(codes, condition)
    guided = any(scale != OFF for scale in choices.scales)
    unconditional = teacher.logits(codes, teacher.null(condition)) if guided else conditional
    found = torch.empty_like(conditional, dtype=torch.float32)
    for unit in range(teacher.plan.n_units):
        part = teacher.plan.columns(unit)
        scale = choices.scales[unit]
        logits = conditional[:, part] if scale == OFF else combine(conditional[:, part], unconditional[:, part], scale)
        found[:, part] = choices.temper(logits, unit)
    return found
