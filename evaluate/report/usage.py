"""How codebooks are used: maps of the codes, usage sorted, and what each scale or stream uses."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .heat import STOPS, UNUSED, colours, css
from .markup import Markup, join, tag
from .pictures import uri
from .runs import Run
from .tables import number, spaced, swatch

Counts = NDArray[np.int64]
SORTED_POINTS = 200
SPREAD = 1.5
"""Decades around even use that the ramp of a map covers."""


def pooled(counts: Mapping[str, Counts]) -> Counts:
    """How often each code was used `[V]`: streams of one vocabulary share their codebook, others follow one another."""
    if "codes" in counts:
        return counts["codes"]
    parts = list(counts.values())
    return np.sum(parts, axis=0) if len({len(part) for part in parts}) == 1 else np.concatenate(parts)


def statistics(counts: Counts) -> tuple[float, float]:
    """Share of the codes in use, and perplexity exp(-Σ p log p)."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float((counts > 0).mean()), float(np.exp(-(p * np.log(p)).sum()))


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One chart: how often codes are used, from the most to the least used, relative to even use; empty without counts."""
    series = [_sorted(index, pooled(run.counts)) for index, run in enumerate(runs) if run.counts]
    if not series:
        return []
    return [{"stage": "codebook", "key": "sorted", "title": "Codes from the most to the least used", "order": 5,
             "x": "share of the codebook", "log": True, "note": "use ÷ even use", "series": series}]  # fmt: skip


def _sorted(run: int, counts: Counts) -> dict[str, Any]:
    """At most `SORTED_POINTS` of the codes in use; a code without a use has no place on a logarithmic axis."""
    used = np.sort(counts[counts > 0])[::-1]
    picked = np.unique(np.linspace(0, len(used) - 1, SORTED_POINTS).round().astype(int))
    relative = used[picked] * len(counts) / counts.sum()
    shares = ((picked + 1) / len(counts)).round(5).tolist()
    y = [float(f"{value:.4g}") for value in relative]
    return {"run": run, "split": "", "step": shares, "samples": [None] * len(y), "y": y}


def section(runs: Sequence[Run], chart: Markup) -> Markup:
    """Maps and bars of every run with counts, side by side; empty without any."""
    counted = [run for run in runs if run.counts]
    if not counted:
        return Markup("")
    about = [
        "How often each code was drawn at the last validation, in the order of their indices: ",
        tag("span", class_="patch", style=f"background:{css(UNUSED)}"), "never, rarely ",
        tag("span", class_="ramp-bar", style=f"background:linear-gradient(90deg, {', '.join(map(css, STOPS))})"),
        " often, evenly in the middle.",
    ]  # fmt: skip
    figures = (_figure(run) for run in counted)
    return join([tag("p", *about, class_="muted lead"), tag("div", *figures, class_="flipbooks"), chart])


def _figure(run: Run) -> Markup:
    counts = pooled(run.counts)
    usage, perplexity = statistics(counts)
    facts = f"{spaced(int((counts > 0).sum()))} of {spaced(len(counts))} codes, perplexity {number(perplexity)}"
    pixels = codebook_map(counts)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    height, width = pixels.shape[:2]
    alt = f"use of the codebook of {run.name}: {usage:.1%} of {len(counts)} codes"
    image = tag("img", src=uri("png", buffer.getvalue()), alt=alt, width=width, height=height, class_="pixelated")
    caption = tag("figcaption", tag("span", swatch(run), run.name), tag("span", facts, class_="muted"))
    streams = {name.removeprefix("codes_"): part for name, part in run.counts.items() if name != "codes"}
    bars = _bars(streams) if len(streams) > 1 else ""
    return tag("figure", caption, tag("div", image, class_="frame codebook"), bars, class_="flipbook")


def codebook_map(counts: Counts) -> NDArray[np.uint8]:
    """One pixel `[rows, columns, 4]` for each code, about square; logarithmic around even use."""
    columns = int(np.ceil(np.sqrt(len(counts))))
    rows = -(-len(counts) // columns)
    even = max(counts.sum(), 1) / len(counts)
    with np.errstate(divide="ignore"):
        shares = np.clip((np.log10(counts / even) / SPREAD + 1) / 2, 0, 1)
    pixels = np.zeros((rows * columns, 4), np.uint8)
    pixels[: len(counts), :3] = np.where(counts[:, None] > 0, colours(shares), np.asarray(UNUSED, np.uint8))
    pixels[: len(counts), 3] = 255
    return pixels.reshape(rows, columns, 4)


def _bars(streams: Mapping[str, Counts]) -> Markup:
    """Usage of each scale or stream as a bar, its perplexity beside it."""
    rows = []
    for name, counts in streams.items():
        usage, perplexity = statistics(counts)
        bar = tag("span", tag("span", style=f"width:{100 * usage:.1f}%"), class_="bar-track")
        told = (tag("td", text, class_="number") for text in (f"{100 * usage:.0f} %", number(perplexity)))
        rows.append(tag("tr", tag("th", name, scope="row"), tag("td", bar), *told))
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Scale", "Codes in use", "", "Perplexity")))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="bars")
