"""The page of a sweep: parallel coordinates, curves of the best points, a table; one file, in the style of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..conf.space import Dimension, split_space
from ..errors import UserError
from ..evaluate.protocol import write_whole
from ..evaluate.report import curves
from ..evaluate.report.markup import Markup, join, script_json, tag
from ..evaluate.report.names import label
from ..evaluate.report.page import curves_section, document
from ..evaluate.report.runs import METRICS, Run, read_run
from ..evaluate.report.tables import number
from .folder import FAILED, FINISHED, Point, SweepFolder, counts
from .tables import train_command
from .values import judged, ranked

COLOURS = 6
CURVES = 12
"""Points whose curves are drawn, the best ones."""
TICKS = 6
"""Different numbers of an axis up to which each is written beside it."""
WIDE = 30
"""Ratio of the ends of an axis of positive numbers from which on it is logarithmic."""


def write_page(path: Path, out: Path) -> Path:
    """Write one self-contained page about a sweep; returns `out`.

    Raises:
        UserError: there is no sweep, or the page cannot be written.
    """
    write_whole(out, page(SweepFolder(path)).encode())
    return out


def page(sweep: SweepFolder) -> str:
    """The page as text."""
    found, best = judged(sweep), ranked(sweep)
    if not found:
        raise UserError("no points yet", where=sweep.path, fix="start the sweep first")
    colours = {point.number: place * COLOURS // len(best) for place, (point, _) in enumerate(best)}
    runs = _runs(sweep, [*(point for point, _ in best), *(point for point, _ in found if point.number not in colours)], colours)
    charts = _charts(sweep, runs)
    sections = {
        "Parameters": _parallel(sweep, found, colours),
        "Curves": curves_section(runs, charts),
        "Points": _table(sweep, found, colours),
        "Failures": join(_failure(sweep, point) for point, _ in found if point.state == FAILED),
    }
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("sweep.css", "sweep.js"))
    return document(sweep.path.name, _cards(sweep, best), sections, runs, charts, style, script)


def _cards(sweep: SweepFolder, best: Sequence[tuple[Point, float]]) -> Markup:
    plan, points = sweep.plan, sweep.points()
    facts = [("points", len(points)), *((state, sum(p.state == state for p in points)) for state in (FINISHED, FAILED))]
    sweep_card = tag(
        "article", tag("p", f"sweep, {plan.settings.method}", class_="stage"), tag("h3", plan.stage),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)),
        tag("p", counts(points), class_="muted"), class_="card",
    )  # fmt: skip
    if not best:
        return sweep_card
    (point, value), settings = best[0], plan.settings
    command = train_command(plan.stage, [*plan.fixed, *point.overrides])
    best_card = tag(
        "article", tag("p", f"best of {len(best)}, by {settings.value} {settings.metric}", class_="stage"),
        tag("h3", f"point {point.number}: {point.words}"),
        tag("dl", tag("div", tag("dt", label(settings.metric)), tag("dd", number(value)))),
        tag("dl", tag("div", tag("dt", "command"), tag("dd", command, class_="words")), class_="wide"),
        class_="card",
    )  # fmt: skip
    return join([sweep_card, best_card])


def _runs(sweep: SweepFolder, points: Sequence[Point], colours: dict[int, int]) -> list[Run]:
    """The runs whose curves are drawn, the best first, coloured by rank; those without a rank are the last colour."""
    shown = [point for point in points if (sweep.run(point) / METRICS).exists()][:CURVES]
    runs = [read_run(sweep.run(point)) for point in shown]
    for point, run in zip(shown, runs, strict=True):
        run.name, run.colour = f"point {point.number}", colours.get(point.number, COLOURS - 1)
    return runs


def _charts(sweep: SweepFolder, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Losses and measures, the sweep's metric first; optimizer and speed are in the report of a run."""
    metric = sweep.plan.settings.metric
    found = [chart for chart in curves.charts(runs) if chart["order"] <= 1 or chart["key"] == metric]
    return sorted(found, key=lambda chart: chart["key"] not in (metric, metric.partition("/")[2]))


def _parallel(sweep: SweepFolder, found: Sequence[tuple[Point, float | None]], colours: dict[int, int]) -> Markup:
    """The place of the parallel coordinates and their data."""
    dimensions = split_space(sweep.plan.space)[1]
    columns = [[_value(text) for text in column] for column in zip(*(point.overrides for point, _ in found), strict=True)]
    axes = [axis(each, column) for each, column in zip(dimensions, columns, strict=True)]
    values = [value for _, value in found if value is not None]
    if values:
        metric = axis(Dimension(sweep.plan.settings.metric), values)
        axes.append({**metric, "log": False, "down": sweep.plan.direction == "minimize"})
    points = [
        {"number": point.number, "colour": colours.get(point.number), "values": [
            *(value if "options" not in each else str(value) for each, value in zip(axes, row, strict=False)),
            *([value_of_point] if values else []),
        ]}
        for (point, value_of_point), row in zip(found, zip(*columns, strict=True), strict=True)
    ]  # fmt: skip
    swatches = (tag("span", class_=f"swatch c{i}") for i in range(COLOURS))
    ramp = tag("p", "best ", *swatches, " worst · drag along an axis to filter, click it to clear", class_="ramp")
    data = Markup(f'<script type="application/json" id="sweep-data">{script_json({"axes": axes, "points": points})}</script>')
    return join([ramp, tag("div", tag("div", id="parallel", class_="parallel"), class_="scroll"), data])


def _value(override: str) -> Any:
    """The value of an override: a number, or its text."""
    text = override.partition("=")[2]
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def axis(dimension: Dimension, values: Sequence[Any]) -> dict[str, Any]:
    """What the script needs of an axis: its ends and scale, or its options where some values are no numbers."""
    if not all(isinstance(value, float) for value in values):
        return {"name": dimension.key, "options": sorted({str(value) for value in values})}
    ends = [dimension.low, dimension.high] if dimension.low < dimension.high else []
    low, high = min([*values, *ends]), max([*values, *ends])
    few = sorted(set(values)) if len(set(values)) <= TICKS and not ends else None
    whole = all(value.is_integer() for value in values)
    return {
        "name": dimension.key,
        "low": low,
        "high": high,
        "log": low > 0 and high / low >= WIDE,
        "integer": whole,
        "ticks": few,
    }


def _table(sweep: SweepFolder, found: Sequence[tuple[Point, float | None]], colours: dict[int, int]) -> Markup:
    """A sortable row for each point, the best first."""
    keys = [each.key for each in split_space(sweep.plan.space)[1]]
    better = "↓" if sweep.plan.direction == "minimize" else "↑"
    head = [("Point", None), ("State", None), (sweep.plan.settings.metric, better), *((key, "") for key in keys), ("Run", None)]
    heads = [
        tag("th", tag("button", name, tag("span", class_="order", aria_hidden="true"), type="button"), scope="col",
            class_="number" if good is not None else None, data_better=good or None)
        for name, good in head
    ]  # fmt: skip
    places = {number: place for place, number in enumerate(colours)}
    best_first = sorted(found, key=lambda item: places.get(item[0].number, len(places)))
    rows = (_row(sweep, point, value, colours) for point, value in best_first)
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="results")
    return tag("div", table, class_="scroll")


def _row(sweep: SweepFolder, point: Point, value: float | None, colours: dict[int, int]) -> Markup:
    colour = colours.get(point.number)
    mark = tag("span", class_=f"swatch {'none' if colour is None else f'c{colour}'}", aria_hidden="true")
    cells = [tag("th", mark, point.number, scope="row", data_value=point.number)]
    cells += [tag("td", point.state), _cell(value, "–" if value is None else number(value))]
    cells += [_cell(_value(text), text.partition("=")[2]) for text in point.overrides]
    return tag("tr", *cells, tag("td", sweep.run(point).name), data_point=point.number)


def _cell(value: Any, text: str) -> Markup:
    return tag("td", text, class_="number", data_value=repr(value) if isinstance(value, float) else None)


def _failure(sweep: SweepFolder, point: Point) -> Markup:
    head = tag("summary", f"point {point.number}: {point.words} ({point.reason}, {point.tries} tries)")
    return tag("details", head, tag("pre", "\n".join([*point.tail, "", f"… {sweep.log(point)}"])), open=True)
