"""What `tokar sweep status` and `best` print."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..evaluate.report.runs import METRICS, rows
from .folder import FAILED, RUNNING, Point, SweepFolder
from .values import judged, ranked
from .worker import failure_words, summary

Rows = list[tuple[str, ...]]


def status(path: Path) -> tuple[Rows, list[str]]:
    """A table with a row for each point, and lines: what failed with its last words, then how the sweep stands.

    Raises:
        UserError: there is no sweep.
    """
    sweep = SweepFolder(path)
    found = judged(sweep)
    best = next((point.number for point, _ in ranked(sweep)), None)
    keys = list(dict.fromkeys(text.partition("=")[0] for point, _ in found for text in point.overrides))
    table: Rows = [("point", "state", "starts", "step", sweep.plan.settings.metric, *keys, "since", "where", "run")]
    for point, value in found:
        values = dict(text.split("=", 1) for text in point.overrides)
        shown = "" if value is None else f"{value:.6g}{' *' if point.number == best else ''}"
        table.append((
            str(point.number), point.state, str(point.starts), _step(sweep, point), shown,
            *(values.get(key, "") for key in keys), _ago(point), _where(point), str(sweep.run(point)),
        ))  # fmt: skip
    failures = [failure_words(sweep, point).removeprefix("tokar: ") for point, _ in found if point.state == FAILED]
    return table, [*failures, summary(sweep)]


def _step(sweep: SweepFolder, point: Point) -> str:
    found, _ = rows(sweep.run(point) / METRICS)
    return str(found[-1]["step"]) if found else ""


def _ago(point: Point) -> str:
    """How long ago the state was written."""
    if not point.starts:
        return ""
    minutes = int(time.time() - point.changed) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h" if minutes < 2880 else f"{minutes // 1440} d"


def _where(point: Point) -> str:
    """The job, or the machine and process, of a point that runs."""
    if point.state != RUNNING:
        return ""
    array = "_".join(str(point.holder[key]) for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in point.holder)
    return f"job {array}" if array else f"{point.holder.get('host')}:{point.holder.get('pid')}"


def best(path: Path) -> list[tuple[str, str]]:
    """The best point: its number, value and overrides, its run, and the command that makes it alone.

    Raises:
        UserError: none has finished yet.
    """
    sweep = SweepFolder(path)
    found = ranked(sweep)
    if not found:
        raise UserError("no point has finished yet", where=path, fix=f"see `tokar sweep status {path}`")
    (point, value), plan = found[0], sweep.plan
    return [
        ("point", f"{point.number} (the best of {len(found)} that finished)"),
        (plan.settings.metric, f"{value:.6g} ({plan.settings.value}, {plan.direction})"),
        ("overrides", point.words),
        ("run", str(sweep.run(point))),
        ("command", train_command(plan.stage, [*plan.fixed, *point.overrides])),
    ]


def train_command(stage: str, overrides: Sequence[str]) -> str:
    """The command of a point, for a shell."""
    return shlex.join(["tokar", "train", stage, *overrides])
