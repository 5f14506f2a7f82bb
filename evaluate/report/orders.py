"""Pictures of the order in which generators reveal tokens: one heat map for each grid of the run's plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .heat import fill
from .markup import Markup, join, tag
from .runs import Run
from .tables import swatch

WIDE = 16
"""Columns of tokens that stand in a row, for those that have no grid."""
NUMBERED = 24
"""Columns up to which the cells hold their numbers."""
CELL, LARGEST = 20, 340
"""Pixels of a cell, and of a picture at most."""


def section(runs: Sequence[Run]) -> Markup:
    """A figure for each run with a plan, side by side; empty without any."""
    figures = [_figure(run) for run in runs if run.plan]
    if not figures:
        return Markup("")
    about = "Each cell is a token, at its place in the image; its number is the step that reveals it, dark ones first."
    return join([tag("p", about, class_="muted lead"), tag("div", *figures, class_="orders")])


def _figure(run: Run) -> Markup:
    plan = run.plan
    total, streams = plan["n_units"], plan["streams"]
    tokens = sum(len(stream["revealed_at"]) for stream in streams)
    steps = f"{total} step{'' if total == 1 else 's'} for {tokens} tokens"
    side = max(_shape(stream)[1] for stream in streams)
    maps = (tag("div", _map(stream, total, side, run.name), tag("span", _about(stream), class_="muted")) for stream in streams)
    caption = tag("figcaption", tag("span", swatch(run), run.name), tag("span", steps, class_="muted"))
    return tag("figure", caption, tag("div", *maps, class_="maps"), class_="order-figure")


def _shape(stream: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the picture."""
    if stream.get("grid"):
        rows, columns = stream["grid"]
        return rows, columns
    count = len(stream["revealed_at"])
    columns = min(WIDE, count)
    return -(-count // columns), columns


def _about(stream: Mapping[str, Any]) -> str:
    rows, columns = _shape(stream)
    if not stream.get("grid"):
        return f"{stream['name']}: {len(stream['revealed_at'])} tokens in a row, read line by line"
    return f"{stream['name']}, {rows}×{columns}"


def _map(stream: Mapping[str, Any], total: int, widest: int, name: str) -> Markup:
    """An SVG; grids of one run keep their proportions to one another, but none gets too small to read."""
    rows, columns = _shape(stream)
    units: list[int] = stream["revealed_at"]
    cells = []
    for token, unit in enumerate(units):
        row, column = divmod(token, columns)
        colour, ink = fill(unit / max(1, total - 1))
        x, y = column * CELL, row * CELL
        cells.append(tag("rect", x=x + 0.5, y=y + 0.5, width=CELL - 1, height=CELL - 1, rx=3, fill=colour))
        if columns <= NUMBERED:
            size = 10 if unit < 99 else 8
            cells.append(tag("text", unit + 1, x=x + CELL / 2, y=y + CELL / 2 + size * 0.36, fill=ink, font_size=size))
    shown = min(LARGEST / widest, 1.5 * CELL)
    label = f"order of {name}, {_about(stream)}: steps {min(units) + 1} to {max(units) + 1}"
    box, width = f"0 0 {columns * CELL} {rows * CELL}", f"width:{columns * shown:.0f}px"
    return tag("svg", *cells, viewBox=box, style=width, role="img", aria_label=label)
