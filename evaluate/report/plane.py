"""The plane of speed and quality: every sampler and student that was measured, at what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..protocol import SECONDS
from .markup import Markup, join, tag
from .names import better, is_cost, is_quality, label, rank
from .runs import Run
from .tables import WAY, Entry, rows_of, swatch, telling

FEWEST = 2
"""Points that make a plane."""
FIRST = (SECONDS, "evaluations")
"""Costs that are drawn first."""


class Point(NamedTuple):
    """One row of a result, or a whole one; `subject` names it among those compared, where it is one of them."""

    entry: Entry
    subject: str
    values: dict[str, float]

    @property
    def device(self) -> tuple[Any, ...]:
        """What it was timed on; nothing where the protocol says it, which points of one plane share."""
        return tuple(self.entry.result.speed.get(key) for key in ("device", "threads"))


def planes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One plane for each protocol with at least two points.

    Returns:
        For each `protocol`, `x` and `y` (metrics by key, with `title` and, for y, `better`) and `points`, each with `mark`
        (what it belongs to), `colour`, `name` and `values` by key.
    """
    found: dict[str, list[Point]] = {}
    for run in runs:
        for file, result in run.results:
            entry = Entry(run, file, result)
            for row, values in rows_of(result).items():
                if not row and SECONDS in result.speed:
                    values[SECONDS] = result.speed[SECONDS]
                if any(_costs(values)) and any(_qualities(values)):
                    found.setdefault(result.protocol_id, []).append(Point(entry, row or entry.facts.get(WAY, ""), values))
    return [_plane(name, points) for name, points in found.items() if len(points) >= FEWEST]


def _costs(values: Mapping[str, float]) -> list[str]:
    return [key for key, value in values.items() if is_cost(key) and value > 0]


def _qualities(values: Mapping[str, float]) -> list[str]:
    return [key for key in values if is_quality(key)]


def _plane(protocol: str, found: Sequence[Point]) -> dict[str, Any]:
    keys = [key for key in telling([point.entry for point in found]) if key not in (WAY, "seed")]
    subjects = list(dict.fromkeys(point.subject for point in found if point.subject))
    several = Counter(point.entry.run.name for point in found)
    points = []
    for entry, subject, values in found:
        colour = subjects.index(subject) if subject else entry.run.colour
        rounded = {key: float(f"{value:.6g}") for key, value in values.items()}
        told = "" if subject or several[entry.run.name] == 1 else _settings(entry, keys)
        mark, name = subject or entry.run.name, " · ".join(filter(None, (subject or entry.run.name, told)))
        points.append({"mark": mark, "colour": colour % 6, "name": name, "values": rounded})
    qualities = dict.fromkeys(key for point in found for key in _qualities(point.values))
    return {
        "protocol": protocol,
        "x": [{"key": key, "title": label(key)} for key in _axes(found)],
        "y": [{"key": key, "title": label(key), "better": better(key)} for key in sorted(qualities, key=_importance)],
        "points": points,
    }


def _axes(found: Sequence[Point]) -> list[str]:
    """Costs to choose from: time first where every point was timed, on one device, then evaluations of the network."""
    costs = dict.fromkeys(key for point in found for key in _costs(point.values))
    if not all(SECONDS in point.values for point in found) or len({point.device for point in found}) > 1:
        costs.pop(SECONDS, None)
    return sorted(costs, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))


def _settings(entry: Entry, keys: Sequence[str]) -> str:
    """What of its settings tells it from the others of its plane."""
    told = [(key.rpartition(".")[2].replace("_", " "), entry.facts.get(key)) for key in keys]
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in told if value)


def _importance(key: str) -> tuple[bool, int]:
    """The Fréchet distance first: it is what this field draws."""
    return not key.startswith("fd_"), rank(key)


def section(found: Sequence[dict[str, Any]]) -> Markup:
    """Places for the planes; the script draws them."""
    return join(_figure(plane, number) for number, plane in enumerate(found))


def _figure(plane: dict[str, Any], number: int) -> Markup:
    colours = {point["mark"]: point["colour"] for point in plane["points"]}
    legend = tag("div", *(tag("span", swatch(colour), mark) for mark, colour in colours.items()), class_="marks")
    about = "Cost grows to the right, on a logarithmic axis. The dashed line joins what nothing else beats in both. Protocol "
    link = tag("a", plane["protocol"], href=f"#protocol-{plane['protocol']}", class_="protocol-id")
    return tag(
        "figure",
        tag("div", _choices(plane["y"], "y"), _choices(plane["x"], "x"), class_="toolbar"),
        legend,
        tag("figcaption", tag("span", about, link, ".", class_="muted")),
        class_="plane",
        data_plane=number,
    )


def _choices(metrics: Sequence[Mapping[str, str]], axis: str) -> Markup:
    buttons = (
        tag("button", metric["title"], type="button", data_metric=place, aria_pressed="true" if place == 0 else "false")
        for place, metric in enumerate(metrics)
    )
    return tag("div", *buttons, class_="choice", role="group", aria_label=f"{axis} axis", data_of=axis)
