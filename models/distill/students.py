"""Which student a teacher has, as a config node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..generators.base import Generator
from ..generators.next_scale import NextScale
from ..generators.next_token import NextToken


def student_node(
    node: Mapping[str, Any], teacher: Generator, embed_dim: int, timesteps: Sequence[int], split: int
) -> dict[str, Any]:
    """The `_target_` node of the one-step student of a teacher.

    Args:
        node: the teacher's.
        teacher: built from it.
        embed_dim: code width.
        timesteps: see `student.Student`.
        split: see `student.Student`.

    Raises:
        UserError: there is no student of such a teacher.
    """
    given = {"teacher": dict(node), "timesteps": list(timesteps), "split": split}
    if isinstance(teacher, NextScale):
        return {"_target_": "tokar.models.distill.scale_student.ScaleStudent", **given}
    if isinstance(teacher, NextToken):
        return {"_target_": "tokar.models.distill.token_student.TokenStudent", "embed_dim": embed_dim, **given}
    raise UserError(
        f"no one-step student of a {type(teacher).__name__}",
        where="teacher",
        fix="take a NextToken (LlamaGen) or a NextScale (VAR)",
    )
