"""Curves of how good images are from a part of their tokens, out of results of `measure=prefixes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..protocol import Result
from .names import label
from .runs import Run
from .tables import rows_of

KIND = "prefixes"
PREFIX = re.compile(r"first (\d+)")


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One chart for each metric over the number of tokens, with the newest result of each run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, run in enumerate(runs):
        newest = {result.name: result for _, result in run.results}.get(KIND)
        for metric, points in (_curves(newest) if newest else {}).items():
            tokens, values = zip(*points, strict=True)
            series = {"run": index, "split": "", "step": list(tokens), "samples": [None] * len(tokens), "y": list(values)}
            found.setdefault(metric, []).append(series)
    return [
        {"stage": KIND, "key": metric, "title": label(metric), "order": 5, "x": "tokens", "logx": True, "series": series}
        for metric, series in found.items()
    ]


def _curves(result: Result) -> dict[str, list[tuple[int, float]]]:
    """Points (tokens, value) of each metric, in order."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row, values in rows_of(result).items():
        if match := PREFIX.fullmatch(row):
            for metric, value in values.items():
                curves.setdefault(metric, []).append((int(match[1]), float(f"{value:.6g}")))
    return {metric: sorted(points) for metric, points in curves.items()}
