"""The report: one HTML file with everything in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..protocol import versions, write_whole
from . import buildup, crops, curves, gallery, orders, plane, tables, usage
from .markup import Markup, join, script_json, tag
from .names import label, rank
from .runs import Run, read_runs

HEADLINES = 3
SCRIPTS = ("kit.js", "plane.js", "report.js")
PARTIAL = ("crops", "prefixes")
"""Results that say little in one number."""


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
    charts = [*curves.charts(runs), *buildup.charts(runs), *usage.charts(runs)]
    planes, pictures = plane.planes(runs), gallery.groups(runs)
    sections = {
        "Results": tables.results(runs),
        "Speed and quality": plane.section(planes),
        "Curves": curves_section(runs, charts),
        "Images": gallery.finished(pictures),
        "Build-up": gallery.partial(pictures, figures_of(charts, "prefixes")),
        "Order": orders.section(runs),
        "Codebook": usage.section(runs, figures_of(charts, "codebook")),
        "Details": crops.side_by_side(runs),
        "Events": tables.events(runs),
        "Configuration": join([tables.config_differences(runs), tables.configs(runs)]),
        "Environment": tables.environment(runs),
    }
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(title, join(_card(run) for run in runs), sections, runs, charts, planes=planes)


def document(
    title: str, cards: Markup, sections: Mapping[str, Markup], runs: Sequence[Run], charts: Sequence[dict[str, Any]],
    style: str = "", script: str = "", planes: Sequence[dict[str, Any]] = (),
) -> str:  # fmt: skip
    """A whole page in the style of the report.

    Args:
        title: its heading.
        cards: what stands first.
        sections: by heading; empty ones are left out.
        runs: that the charts are of.
        charts: that the script draws into the figures of `curves_section`.
        style, script: added behind the report's own.
        planes: of speed and quality, for the script.
    """
    present = {name: body for name, body in sections.items() if body}
    marks = [{"name": run.name, "colour": run.colour % 6} for run in runs]
    return Template(_asset("template.html")).substitute(
        title=join([title]),
        style=_asset("report.css") + style,
        script="".join(map(_asset, SCRIPTS)) + script,
        nav=join(tag("a", name, href=f"#{_anchor(name)}") for name in present),
        cards=cards,
        sections=join(tag("section", tag("h2", name), body, id=_anchor(name), class_="part") for name, body in present.items()),
        data=script_json({"charts": charts, "planes": planes, "runs": marks}),
        version=versions().get("tokar", ""),
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _card(run: Run) -> Markup:
    facts = [f"step {tables.spaced(run.last_step)}"] if run.last_step is not None else []
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
    if all("x" in chart for chart in charts):
        return Markup("")
    parts = [_toolbar(charts)]
    stages = [chart["stage"] for chart in charts if "x" not in chart]
    for stage in dict.fromkeys(run.stage for run in runs):
        own = [index for index, chart in enumerate(charts) if chart["stage"] == stage and "x" not in chart]
        if own:
            named = tag("h3", stage) if len(set(stages)) > 1 else ""
            named = join([named, _legend(runs, {series["run"] for index in own for series in charts[index]["series"]})])
            rest = [index for index in own if _is_aside(charts[index])]
            first = _figures(charts, [index for index in own if index not in rest])
            more = tag(
                "details",
                tag("summary", "Optimizer, speed and single streams"),
                _figures(charts, rest),
                open=True,
                class_="more",
            )
            parts.append(tag("section", named, first, more if rest else "", class_="kind"))
    return join(parts)


def figures_of(charts: Sequence[dict[str, Any]], stage: str) -> Markup:
    """Places for the charts that stand elsewhere than among the curves; empty without any."""
    own = [index for index, chart in enumerate(charts) if chart["stage"] == stage and "x" in chart]
    return _figures(charts, own, "charts apart") if own else Markup("")


def _figures(charts: Sequence[dict[str, Any]], shown: Sequence[int], kind: str = "charts") -> Markup:
    return tag("div", *(_figure(charts[index], index) for index in shown), class_=kind)


def _is_aside(chart: dict[str, Any]) -> bool:
    """Rates, norms and speeds, and the codes of one stream among several: told apart, and folded on a phone."""
    return bool(chart["order"] >= 3) or chart["key"].startswith("codes_")


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
