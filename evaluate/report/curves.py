"""Curves for the page's script: one chart for each stage and metric, thinned so that the page stays small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .names import label
from .runs import Row, Run

MOST_POINTS = 600
SPLITS = ("train", "val")
NOT_A_CURVE = {"step", "samples", "epoch"}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Charts with their series, training metrics first, then codebook, optimizer and speed.

    `train/x` and `val/x` share a chart; so do runs of one stage.

    Returns:
        For each chart `stage`, `key`, `title`, `order` and `series`, each with `run` (index), `split`, `step`, `samples`, `y`.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for index, run in enumerate(runs):
        for rows, speed in ((run.metrics, False), (run.timing, True)):
            for key in dict.fromkeys(key for row in rows for key in row if key not in NOT_A_CURVE):
                series = _series(rows, key)
                if not series["y"]:
                    continue
                split, name = _split(key)
                chart = found.setdefault(
                    (run.stage, name),
                    {"stage": run.stage, "key": name, "title": label(name), "order": _order(name, speed), "series": []},
                )
                chart["series"].append({"run": index, "split": split, **series})
    return sorted(found.values(), key=lambda chart: chart["order"])


def _split(key: str) -> tuple[str, str]:
    first, _, rest = key.partition("/")
    return (first, rest) if first in SPLITS and rest else ("", key)


def _order(name: str, speed: bool) -> int:
    if speed:
        return 4
    if "usage" in name or "perplexity" in name:
        return 2
    if "lr" in name.split("/") or "grad" in name or name.startswith("optim"):
        return 3
    return 0 if name == "loss" else 1


def _series(rows: Sequence[Row], key: str) -> dict[str, list[Any]]:
    points = [(row["step"], row.get("samples"), float(row[key])) for row in rows if _is_number(row.get(key))]
    points = thin(points)
    return {"step": [p[0] for p in points], "samples": [p[1] for p in points], "y": [_short(p[2]) for p in points]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def thin(points: list[tuple[int, Any, float]], most: int = MOST_POINTS) -> list[tuple[int, Any, float]]:
    """At most about `most` points: the lowest and the highest of each stretch, so that no spike is lost, and both ends."""
    if len(points) <= most:
        return points
    kept = {0, len(points) - 1}
    stretches = most // 2
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(stretch, key=lambda j: points[j][2]), max(stretch, key=lambda j: points[j][2])}
    return [points[j] for j in sorted(kept)]
