"""Grids of pictures, those of several runs beside one another, each with a slider over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markup import Markup, join, script_json, tag
from .pictures import embed, series
from .runs import Run
from .tables import swatch

PARTIAL = ("partial", "images")
"""Ends of the names of pictures that show how images build up: those drawn while training, and by `measure=prefixes`."""
ENLARGED = 480
Item = tuple[Run, Sequence[tuple[str, Path]]]


def groups(runs: Sequence[Run]) -> dict[str, list[Item]]:
    """Pictures by what they show, with the runs that have them."""
    found: dict[str, list[Item]] = {}
    for run in runs:
        for name, items in series(run).items():
            found.setdefault(name, []).append((run, items))
    return found


def is_partial(name: str) -> bool:
    """Whether pictures of this name belong to the section on how images build up."""
    return name.rpartition(" ")[2] in PARTIAL


def finished(found: Mapping[str, Sequence[Item]]) -> Markup:
    """Whole images; empty without any."""
    return join(_group(name, items, _seeds(items)) for name, items in found.items() if not is_partial(name))


def partial(found: Mapping[str, Sequence[Item]], charts: Markup) -> Markup:
    """Images from a part of their tokens, and curves of how good those are; empty without any."""
    items = [item for name, group in found.items() if is_partial(name) for item in group]
    if not items:
        return charts
    lead = tag("p", "A row is an image, from its first tokens to all of them; above each column stands how many it has.",
               class_="muted lead")  # fmt: skip
    return join([lead, _books("build-up", items), charts])


def _group(name: str, items: Sequence[Item], note: str) -> Markup:
    heading = tag("h3", name, " ", tag("span", note, class_="muted") if note else "")
    return tag("section", heading, _books(name, items), class_="kind")


def _books(name: str, items: Sequence[Item]) -> Markup:
    """Sliders of one group move together."""
    return tag("div", *(_flipbook(run, name, pictures) for run, pictures in items), class_="flipbooks linked")


def _seeds(items: Sequence[Item]) -> str:
    """Says where a place in one grid may be compared with the same place in another: seed and classes are equal."""
    drawn = [run for run, _ in items if "sampling" in run.config]
    if len(drawn) < len(items):
        return ""
    seeds = list(dict.fromkeys(run.config.get("seed") for run in drawn))
    if len(drawn) < 2:
        return f"classes in turn, seed {seeds[0]}"
    same = len(seeds) == 1
    return f"the same classes and seed ({seeds[0]}) in the same places" if same else f"seeds {', '.join(map(str, seeds))}"


def _flipbook(run: Run, name: str, items: Sequence[tuple[str, Path]]) -> Markup:
    """One picture with a slider over the steps; it opens at the last."""
    shown: list[dict[str, Any]] = []
    for step, path in items:
        try:
            uri, size, told = embed(path)
            shown.append({"step": step, "src": uri, "size": size, "about": told})
        except OSError:
            run.notes.append(f"{path.parent.name}/{path.name} left out: no readable image")
    if not shown:
        return Markup("")
    last = shown[-1]
    frames = [{"step": frame["step"], "src": frame["src"]} for frame in shown[:-1]] + [{"step": last["step"]}]
    width, height = last["size"]
    sharp = "pixelated" if width <= ENLARGED else None  # a small grid grows by whole pixels, a large one shrinks smoothly
    image = tag("img", src=last["src"], alt=f"{name} of {run.name}", width=width, height=height, class_=sharp)
    step = tag("output", f"step {last['step']}" if last["step"] else "", class_="muted")
    controls: list[Markup] = []
    if len(shown) > 1:
        play = tag("button", "Play", type="button", class_="chip play")
        slider = tag("input", type="range", min=0, max=len(shown) - 1, value=len(shown) - 1, aria_label=f"step of {name}")
        frames_json = Markup(f'<script type="application/json">{script_json(frames)}</script>')
        controls = [tag("div", slider, play, class_="controls"), frames_json]
    caption = tag("figcaption", tag("span", swatch(run), run.name), step)
    return tag("figure", caption, tag("div", _headed(image, last["about"]), class_="frame"), *controls, class_="flipbook")


def _headed(image: Markup, told: Mapping[str, Any]) -> Markup:
    """The picture with what its columns are above them, and what else it tells of itself below."""
    columns, note = told.get("columns"), told.get("note")
    head = tag("div", *(tag("span", name) for name in columns), class_="columns") if columns else ""
    return tag("div", head, image, tag("p", note, class_="muted note") if note else "", class_="headed")
