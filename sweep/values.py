"""The metric of a point, read from its run's metrics.jsonl: while it runs and when it has ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, nearest
from ..evaluate.report.names import better
from ..evaluate.report.runs import METRICS, Row, rows
from .folder import FINISHED, Plan, Point, SweepFolder

Series = list[tuple[int, float]]
"""Steps and values of a metric, in the order of steps."""


def direction_of(metric: str) -> str | None:
    """`minimize` or `maximize`, from the name of a metric; `None` where it does not say."""
    return {"↑": "maximize", "↓": "minimize"}.get(better(metric))


def series(run: Path, metric: str) -> Series:
    """The finite values of a metric that a run has logged so far."""
    return _series(rows(run / METRICS)[0], metric)


def _series(found: Sequence[Row], metric: str) -> Series:
    values = [(row["step"], row[metric]) for row in found if isinstance(row.get(metric), int | float)]
    return [(step, float(value)) for step, value in values if math.isfinite(value)]


def value_of(run: Path, plan: Plan) -> float:
    """What a finished run is judged by.

    Raises:
        UserError: the run has not logged the metric, or never as a number.
    """
    found, _ = rows(run / METRICS)
    values = [value for _, value in _series(found, plan.settings.metric)]
    if not values:
        known = sorted({key for row in found for key in row} - {"step", "samples"})
        raise UserError(
            f"no metric {plan.settings.metric!r} here", where=run / METRICS, fix=nearest(plan.settings.metric, known)
        )
    if plan.settings.value == "last":
        return values[-1]
    return min(values) if plan.direction == "minimize" else max(values)


def judged(sweep: SweepFolder) -> list[tuple[Point, float | None]]:
    """All points with their values; `None` for those that have not finished or lack the metric."""
    return [(point, _value(sweep, point)) for point in sweep.points()]


def _value(sweep: SweepFolder, point: Point) -> float | None:
    if point.state != FINISHED:
        return None
    try:
        return value_of(sweep.run(point), sweep.plan)
    except UserError:
        return None


def ranked(sweep: SweepFolder) -> list[tuple[Point, float]]:
    """Finished points with their values, the best first; of equals the one with the lower number.

    Raises:
        UserError: points have finished, but none has the metric.
    """
    found = judged(sweep)
    kept = [(point, value) for point, value in found if value is not None]
    if not kept and (finished := [point for point, _ in found if point.state == FINISHED]):
        value_of(sweep.run(finished[0]), sweep.plan)
    sign = 1 if sweep.plan.direction == "minimize" else -1
    return sorted(kept, key=lambda item: sign * item[1])
