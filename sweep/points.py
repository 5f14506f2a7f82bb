"""The points of a sweep: the combinations of a grid, draws that depend on (seed, number) alone, or what Optuna asks for."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..conf.compose import Composed
from ..conf.space import Dimension, beside_the_first, compose_all
from ..data.progress import progress_bar
from ..errors import ConfigError, UserError
from ..train.folder import run_folder
from .folder import Plan, Point, SweepFolder

REDRAWS = 100
"""How often a point that is there already is drawn again before the space counts as used up."""


def planned(plan: Plan, dimensions: Sequence[Dimension]) -> list[tuple[str, ...]]:
    """The values of every point that is known before any runs: none for Optuna.

    Raises:
        UserError: an interval in a grid, or fewer different points than were asked for.
    """
    settings = plan.settings
    if settings.method == "tpe":
        return []
    if settings.method == "grid":
        return _grid(dimensions)
    assert settings.count is not None
    return _draws(dimensions, settings.count, settings.seed)


def _grid(dimensions: Sequence[Dimension]) -> list[tuple[str, ...]]:
    endless = [each.key for each in dimensions if not each.values]
    if endless:
        raise UserError("a grid needs a list of values, not an interval", where=endless[0],
                        fix="list them, or take sweep=random or sweep=tpe")  # fmt: skip
    return list(itertools.product(*(each.corners for each in dimensions)))


def _draws(dimensions: Sequence[Dimension], count: int, seed: int) -> list[tuple[str, ...]]:
    """Different points, each drawn by (seed, number, attempt): asking for more leaves the first ones as they are."""
    found: dict[tuple[str, ...], None] = {}
    for number in range(count):
        for attempt in range(REDRAWS):
            draw = random.Random(f"{seed}/{number}/{attempt}")
            values = tuple(each.at(draw.random()) for each in dimensions)
            if values not in found:
                found[values] = None
                break
        else:
            raise UserError(f"no {count} different points in this space", where="sweep.count",
                            fix=f"set sweep.count={len(found)}, or take sweep=grid")  # fmt: skip
    return list(found)


def check_points(plan: Plan, dimensions: Sequence[Dimension], values: Sequence[tuple[str, ...]]) -> list[Composed]:
    """Compose and check every point, or, where they are not known yet, every value beside the first of the others.

    Raises:
        ConfigError: the problems of all points, or two points that are one run.
    """
    shown = [list(each) for each in values] or beside_the_first(dimensions)
    with progress_bar(None, len(shown), "checking points") as advance:
        composed = compose_all(plan.stage, ([*plan.fixed, *each] for each in shown), advance)
    folders: dict[Path, Sequence[str]] = {}
    for each, one in zip(shown, composed, strict=True):
        folder = run_folder(one)
        if folder in folders:
            both = f"{' '.join(folders[folder])} and {' '.join(each)}"
            raise ConfigError([f"{both} are one run, {folder}; vary keys that change what is computed, and leave out name=…"])
        folders[folder] = each
    return composed


def add_points(sweep: SweepFolder, values: Sequence[tuple[str, ...]], composed: Sequence[Composed]) -> None:
    """Write the points that are not there yet, waiting.

    Raises:
        UserError: the folder holds other points of these numbers.
    """
    for number, (each, one) in enumerate(zip(values, composed, strict=True)):
        known = sweep.point(number)
        if known is not None and known.overrides != each:
            what = f"point {number} was {known.words}, now it would be {' '.join(each)}"
            raise UserError(what, where=sweep.path, fix="set sweep.name=… for a new sweep")
        if known is None:
            sweep.write(new_point(sweep, number, each, one))


def new_point(sweep: SweepFolder, number: int, values: tuple[str, ...], composed: Composed, trial: int | None = None) -> Point:
    """A point that waits."""
    return Point(number, values, os.path.relpath(run_folder(composed), sweep.path), trial=trial)


def total(plan: Plan, known: int) -> float:
    """How many points the sweep has when all are there; a grid's are all known."""
    return max(known, plan.settings.count or 0) if plan.settings.method != "grid" else known


def numbers(points: Sequence[Point]) -> Iterator[int]:
    """Numbers in the order in which points should run: those that never failed first."""
    return (point.number for point in sorted(points, key=lambda point: (point.tries, point.number)))
