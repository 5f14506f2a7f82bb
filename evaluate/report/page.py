"""The report: one HTML file with everything in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..protocol import versions, write_whole
from . import crops, curves, pictures, tables
from .markup import Markup, join, tag
from .names import label, rank
from .runs import Run, read_runs

HEADLINES = 3
PARTIAL = ("crops", "prefixes")
"""Results that say little in one number."""
ENLARGED = 480


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about one or several runs.

    Args:
        runs: run folders, in the order in which they will stand.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        UserError: a folder is no run, or the page cannot be written.
    """
    read = read_runs(runs)
    write_whole(out, page(read).encode())
    for run in read:
        for note in run.notes:
            sys.stderr.write(f"warning: {run.folder}: {note}\n")
    return out


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    charts = curves.charts(runs)
    sections = {
        "Results": tables.results(runs),
        "Curves": curves_section(runs, charts),
        "Events": tables.events(runs),
        "Details": crops.side_by_side(runs),
        "Images": _images(runs),
        "Configuration": join([tables.config_differences(runs), tables.configs(runs)]),
        "Environment": tables.environment(runs),
    }
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(title, join(_card(run) for run in runs), sections, runs, charts)


def document(
    title: str, cards: Markup, sections: Mapping[str, Markup], runs: Sequence[Run], charts: Sequence[dict[str, Any]],
    style: str = "", script: str = "",
) -> str:  # fmt: skip
    """A whole page in the style of the report.

    Args:
        title: its heading.
        cards: what stands first.
        sections: by heading; empty ones are left out.
        runs: that the charts are of.
        charts: that the script draws into the figures of `curves_section`.
        style, script: added behind the report's own.
    """
    present = {name: body for name, body in sections.items() if body}
    return Template(_asset("template.html")).substitute(
        title=join([title]),
        style=_asset("report.css") + style,
        script=_asset("report.js") + script,
        nav=join(tag("a", name, href=f"#{name.lower()}") for name in present),
        cards=cards,
        sections=join(tag("section", tag("h2", name), body, id=name.lower(), class_="part") for name, body in present.items()),
        data=script_json({"charts": charts, "runs": [{"name": run.name, "colour": run.colour % 6} for run in runs]}),
        version=versions().get("tokar", ""),
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _card(run: Run) -> Markup:
    facts = [f"step {run.last_step:,}".replace(",", "\u2009")] if run.last_step is not None else []
    started = str(run.environment.get("started", ""))[:16].replace("T", " ")
    facts += [started] if started else []
    headlines = [tag("div", tag("dt", label(key)), tag("dd", tables.number(value))) for key, value in _headlines(run)]
    return tag(
        "article",
        tag("p", run.stage or "run", class_="stage"),
        tag("h3", tables.swatch(run), run.name),
        tag("dl", *headlines) if headlines else "",
        tag("p", " · ".join(facts), class_="muted") if facts else "",
        *(tag("p", note, class_="warning") for note in run.notes),
        class_="card",
    )


def _headlines(run: Run) -> list[tuple[str, float]]:
    """The most telling numbers of the last evaluation, else of validation."""
    whole = [result for _, result in run.results if result.name not in PARTIAL]
    found: dict[str, float] = dict(whole[-1].numbers) if whole else {}
    for row in [] if found else run.metrics:
        found |= {
            key.partition("/")[2]: value for key, value in row.items() if key.startswith("val/") and isinstance(value, float)
        }
    return sorted(found.items(), key=lambda item: rank(item[0]))[:HEADLINES]


def curves_section(runs: Sequence[Run], charts: Sequence[dict[str, Any]]) -> Markup:
    """Places for the charts; the script draws them."""
    if not charts:
        return Markup("")
    parts = [_toolbar(charts)]
    for stage in dict.fromkeys(run.stage for run in runs):
        own = [index for index, chart in enumerate(charts) if chart["stage"] == stage]
        if own:
            named = tag("h3", stage) if len({chart["stage"] for chart in charts}) > 1 else ""
            named = join([named, _legend(runs, {series["run"] for index in own for series in charts[index]["series"]})])
            figures = (_figure(charts[index], index) for index in own)
            parts.append(tag("section", named, tag("div", *figures, class_="charts"), class_="kind"))
    return join(parts)


def _legend(runs: Sequence[Run], shown: set[int]) -> Markup:
    """Runs that share charts, each a switch; nothing for a run alone."""
    chips = [
        tag(
            "button",
            tables.swatch(runs[index]),
            runs[index].name,
            type="button",
            class_="chip",
            data_run=index,
            aria_pressed="true",
        )
        for index in sorted(shown)
    ]
    return tag("div", *chips, class_="legend") if len(chips) > 1 else Markup("")


def _figure(chart: dict[str, Any], index: int) -> Markup:
    return tag("figure", tag("figcaption", chart["title"], tag("span", class_="last")), class_="chart", data_chart=index)


def _toolbar(charts: Sequence[dict[str, Any]]) -> Markup:
    with_samples = any(value is not None for chart in charts for series in chart["series"] for value in series["samples"])
    axis = tag(
        "div",
        *(_choice(name, name == "step") for name in ("step", "samples")),
        class_="choice",
        role="group",
        aria_label="x axis",
    )
    smooth = tag("label", "smoothing ", tag("input", type="range", id="smooth", min=0, max=95, value=0))
    log = tag("button", "log", type="button", class_="chip", id="log", aria_pressed="false", title="logarithmic y axis")
    return tag("div", axis if with_samples else "", smooth, log, class_="toolbar")


def _choice(name: str, chosen: bool) -> Markup:
    return tag("button", name, type="button", data_axis=name, aria_pressed="true" if chosen else "false")


def _images(runs: Sequence[Run]) -> Markup:
    found = [(run, name, items) for run in runs for name, items in pictures.series(run).items()]
    return tag("div", *(_flipbook(run, name, items) for run, name, items in found), class_="flipbooks") if found else Markup("")


def _flipbook(run: Run, name: str, items: Sequence[tuple[str, Path]]) -> Markup:
    """One picture with a slider over the steps; it opens at the last."""
    shown: list[dict[str, Any]] = []
    for step, path in items:
        try:
            uri, size = pictures.embed(path)
            shown.append({"step": step, "src": uri, "size": size})
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
    caption = tag(
        "figcaption", tag("span", tables.swatch(run), tag("strong", name), " ", tag("span", run.name, class_="muted")), step
    )
    return tag("figure", caption, tag("div", image, class_="frame"), *controls, class_="flipbook")
