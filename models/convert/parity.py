"""Parity: our models against answers that the original implementations gave, from one file.

The file holds groups of tensors (`state.*`, or `vqvae.*` and `var.*`, …: original state dicts, perhaps in float16),
inputs `in.*`, answers `out.*` and, as metadata, the `config` of the original's constructor as JSON.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import UserError
from ..build import build, load_strict
from .checkpoint import full_precision
from .families import find, recognise
from .family import Family, shapes_of

TOLERANCE = 1e-4
_MISSING = "not available"


@dataclass(frozen=True)
class Comparison:
    """One `out.*` beside ours.

    Args:
        name: without the `out.` prefix.
        difference: largest absolute difference over the largest absolute value of the answer (floats), or the share
            of unequal entries (integers); infinite where shapes differ or ours is missing.
        tolerance: the largest difference that passes.
        note: why it cannot be compared, else empty.
    """

    name: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Within the tolerance."""
        return self.difference <= self.tolerance

    @property
    def verdict(self) -> str:
        """One word for a table."""
        return "ok" if self.ok else "MISSING" if self.note.startswith(_MISSING) else "DIFFERS"


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of one file."""

    file: Path
    family: str
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """Every output is within its tolerance, and there is at least one."""
        return bool(self.comparisons) and all(comparison.ok for comparison in self.comparisons)


def run_parity(file: Path) -> ParityReport:
    """Build our model from a parity file, load its weights strictly and compare every answer (CPU, float32).

    Raises:
        UserError: the file is unreadable, of no known family, or its weights do not fit.
    """
    groups, config = _read(file)
    inputs, expected = groups.pop("in", {}), groups.pop("out", {})
    if not expected:
        raise UserError(
            "not a parity file: no answers in it", where=file, fix="give a .safetensors file with state, in and out"
        )
    families = {part: family for part, state in groups.items() if (family := find(state))}
    family = _family_of(groups, families, where=file)
    models = {part: load_original(found, groups[part], config, where=file) for part, found in families.items()}
    with torch.inference_mode():
        ours = family.answers(models, inputs, config)
    unread = ", ".join(f"{part}.*" for part in groups if part not in families)
    missing = f"{_MISSING} yet: no model for {unread}" if unread else f"{_MISSING} from our model"
    results = tuple(compare(name, ours.get(name), answer, missing) for name, answer in expected.items())
    return ParityReport(file, family.name, results)


def _family_of(groups: Mapping[str, dict[str, Tensor]], families: Mapping[str, Family], *, where: Path) -> Family:
    """The family that answers for all groups, or that of the only group that any family reads."""
    whole = next((family for family in families.values() if set(family.parts) == set(groups)), None)
    if whole is not None:
        return whole
    if len(families) == 1:
        return next(iter(families.values()))
    if groups and not families:
        recognise(next(iter(groups.values())), where=where)  # raises: says what is unknown
    raise UserError(f"no family has the parts {', '.join(groups) or '(none)'}", where=where, fix="see the parity layout")


def load_original(family: Family, state: Mapping[str, Tensor], config: Mapping[str, Any], *, where: object) -> nn.Module:
    """Our model with an original state dict in it, in eval mode.

    Raises:
        UserError: config and weights contradict each other.
    """
    with torch.device("meta"):
        model: nn.Module = build(family.config_from(shapes_of(state), config), trusted=False)
    ours, _ = family.to_ours(state)
    load_strict(model, ours, where=where)
    return model.eval()


def compare(name: str, ours: Tensor | None, answer: Tensor, missing: str = f"{_MISSING} from our model") -> Comparison:
    """Floats relative to the answer's largest absolute value, within 1e-4; integers and booleans must be equal."""
    tolerance = TOLERANCE if answer.is_floating_point() else 0.0
    if ours is None:
        return Comparison(name, float("inf"), tolerance, missing)
    if ours.shape != answer.shape:
        return Comparison(name, float("inf"), tolerance, f"shape {tuple(ours.shape)}, not {tuple(answer.shape)}")
    if not answer.is_floating_point():
        return Comparison(name, (ours != answer).double().mean().item(), tolerance)
    difference = (ours.double() - answer.double()).abs().max() / answer.double().abs().max().clamp_min(1e-30)
    # NaN compares false with everything: make it fail as what it is.
    return Comparison(name, difference.nan_to_num(nan=float("inf")).item(), tolerance)


def _read(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(file, "pt") as content:
            config = json.loads((content.metadata() or {}).get("config", "{}"))
            for key in content.keys():  # noqa: SIM118  (not a mapping)
                part, _, name = key.partition(".")
                groups[part][name] = content.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"not a parity file ({error})", where=file, fix="give a .safetensors file with state, in and out"
        ) from error
    return {part: full_precision(tensors) for part, tensors in groups.items()}, config
