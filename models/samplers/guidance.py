"""Schedules over sampling progress, and classifier-free guidance in one convention.

The guidance scale is stored as `s` in `u + s·(c - u)`: 1 is no guidance. VAR's `(1 + t)·c - t·u` is `s = 1 + t`.
Progress is the share of tokens committed, `i/N`; for `ramp` it is `k/(K-1)` of unit `k`, as VAR counts its scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ...errors import UserError, nearest
from ..generators.plan import Plan

Varying = float | str | Mapping[str, Any]
OFF = 1.0


@dataclass(frozen=True)
class Schedule:
    """A number that changes while an image is generated.

    Args:
        kind: one of `KINDS`.
        value: what it reaches.
        first: what it starts from, and what it is where it is off.
        start: progress at which `step` and `interval` switch on.
        stop: progress at which `interval` switches off again.
        power: exponent of progress for `power_cosine` (RAR 1.2 … 2.75).
    """

    kind: str = "constant"
    value: float = 1.0
    first: float = OFF
    start: float = 0.0
    stop: float = 1.0
    power: float = 1.0

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]."""
        if self.kind == "constant":
            return self.value
        return self.first + (self.value - self.first) * KINDS[self.kind](self, progress)

    def over(self, plan: Plan) -> list[float]:
        """The value at every unit of `plan`."""
        if self.kind == "ramp":
            return [self(unit / max(plan.n_units - 1, 1)) for unit in range(plan.n_units)]
        return [self(plan.committed[unit] / plan.n_tokens) for unit in range(plan.n_units)]


# Share of the way from `first` to `value` at a progress.
KINDS: dict[str, Callable[[Schedule, float], float]] = {
    "constant": lambda schedule, progress: 1.0,
    "linear": lambda schedule, progress: progress,
    "ramp": lambda schedule, progress: progress,
    "cosine": lambda schedule, progress: (1 - math.cos(math.pi * progress)) / 2,
    "power_cosine": lambda schedule, progress: (1 - math.cos(math.pi * progress**schedule.power)) / 2,
    "step": lambda schedule, progress: float(progress >= schedule.start),
    "interval": lambda schedule, progress: float(schedule.start <= progress < schedule.stop),
}


def parse_schedule(value: Varying | Schedule, where: str = "guidance") -> Schedule:
    """A schedule from what a config or a command line can say.

    Args:
        value: a number; a mapping of `Schedule`'s arguments; `"kind:value"`, `"kind:value,key=number,…"`
            (`"step:1.75,start=0.18"`); or `"first,last"` for a linear one (D-AR's `"1.2,8.0"`).
        where: the config key, for the error.

    Raises:
        UserError: unknown kind or key, or not a number.
    """
    if isinstance(value, Schedule):
        return value
    given = _read_text(value, where) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        return Schedule(value=_number(given, where))
    names = [field.name for field in fields(Schedule)]
    for key in given:
        if key not in names:
            raise UserError(f"a schedule has no {key!r}", where=where, fix=nearest(str(key), names))
    kind = str(given.get("kind", "constant"))
    if kind not in KINDS:
        raise UserError(f"no schedule {kind!r}", where=f"{where}.kind", fix=nearest(kind, KINDS))
    if "value" not in given:
        raise UserError("a schedule needs a value", where=where, fix="add value: the number it reaches")
    numbers = {key: _number(entry, f"{where}.{key}") for key, entry in given.items() if key != "kind"}
    return Schedule(kind, **numbers)


def _read_text(text: str, where: str) -> float | dict[str, Any]:
    kind, colon, rest = text.partition(":")
    if colon:
        head, *options = rest.split(",")
        return {
            "kind": kind.strip(),
            "value": head,
            **{key.strip(): number for key, _, number in (o.partition("=") for o in options)},
        }
    first, comma, last = text.partition(",")
    return {"kind": "linear", "first": first, "value": last} if comma else _number(text, where)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{value!r} is not a number", where=where, fix="write a number, or {kind: step, value: 1.75, start: 0.18}"
        )
    return number


def check_guidance(guidance: Varying, plan: Plan, dropout: float) -> None:
    """Make sure that there is something to guide away from.

    Args:
        guidance: scale or schedule.
        plan: of the generator.
        dropout: share of the samples that it learned from without their condition.

    Raises:
        UserError: guidance, and it never saw a sample without its condition.
    """
    if dropout == 0 and any(scale != OFF for scale in parse_schedule(guidance).over(plan)):
        raise UserError(
            "guidance for a generator that never learns without its condition (class_dropout=0)",
            where="sampling.guidance",
            fix="set sampling.guidance=1, or train with class_dropout=0.1",
        )


def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guided logits `u + s·(c - u)`, in float32."""
    unconditional = unconditional.float()
    return unconditional + scale * (conditional.float() - unconditional)
