"""Which student a teacher has, as a config node."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..build import resolve_target
from ..generators.base import Generator
from ..generators.next_scale import NextScale
from ..generators.next_token import NextToken

_RATES = ("_dropout", "drop_path")


def without_dropout(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node of a generator with every rate of dropout and stochastic depth at 0.

    What is distilled has one right answer for each noise, which a network whose input and layers are dropped at random cannot
    give: the dropout that keeps a teacher from learning its images by heart only hides it (docs/decisions.md).
    """
    rates = [name for name in inspect.signature(resolve_target(node["_target_"])).parameters if name.endswith(_RATES)]
    parts = {name: without_dropout(part) for name, part in node.items() if isinstance(part, Mapping) and "_target_" in part}
    return {**node, **parts, **dict.fromkeys(rates, 0.0)}


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
    given = {"teacher": without_dropout(node), "timesteps": list(timesteps), "split": split}
    if isinstance(teacher, NextScale):
        return {"_target_": "tokar.models.distill.scale_student.ScaleStudent", **given}
    if isinstance(teacher, NextToken):
        return {"_target_": "tokar.models.distill.token_student.TokenStudent", "embed_dim": embed_dim, **given}
    raise UserError(
        f"no one-step student of a {type(teacher).__name__}",
        where="teacher",
        fix="take a NextToken (LlamaGen) or a NextScale (VAR)",
    )
