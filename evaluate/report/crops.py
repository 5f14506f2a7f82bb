"""Details and text, side by side: the original and every tokenizer that was measured on the same crops."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..protocol import Result
from .markup import Markup, join, tag
from .pictures import uri
from .runs import Run
from .tables import swatch

SUFFIX = "_crops"
"""Ends the name of the picture beside a result: originals above, reconstructions below."""
SHOWN = 128
"""Pixels a side of a crop on the page, at least; enlarged by whole pixels."""
Entry = tuple[Run, Result, list[list[Image.Image]]]


def side_by_side(runs: Sequence[Run]) -> Markup:
    """One table for each set of crops: a row for each crop, the original, then each run with its PSNR; empty without any."""
    sets: dict[str, dict[str, Entry]] = {}
    for run in runs:
        for name, result in run.results:
            if result.name == "crops" and (cells := _cells(run, name, result)):
                sets.setdefault(result.protocol_id, {})[run.name] = (run, result, cells)  # the newest of a run
    return join(_table(list(entries.values())) for entries in sets.values())


def _cells(run: Run, name: str, result: Result) -> list[list[Image.Image]]:
    """Originals and reconstructions; nothing, and a note, where the picture is gone."""
    path = Path(run.folder) / "evaluation" / f"{name}{SUFFIX}.png"
    side, count = int(result.protocol["side"]), len(result.protocol["crops"])
    try:
        with Image.open(path) as image:
            sheet = image.convert("RGB")
    except OSError:
        run.notes.append(f"evaluation/{path.name} left out: no readable image")
        return []
    return [[sheet.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for x in range(count)] for y in range(2)]


def _table(entries: Sequence[Entry]) -> Markup:
    names = entries[0][1].protocol["crops"]
    head = [tag("th", "", scope="col"), tag("th", "original", scope="col")]
    head += [tag("th", swatch(run), run.name, scope="col") for run, _, _ in entries]
    rows = []
    for number, name in enumerate(names):
        cells = [tag("td", _figure(entries[0][2][0][number], name, "original"))]
        for run, result, (_, written) in entries:
            value = f"{result.numbers[f'{name}/psnr']:.2f} dB"
            cells.append(tag("td", _figure(written[number], f"{name} of {run.name}", value)))
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="plain crops")
    about = f"{entries[0][1].protocol['data'].get('source', 'images')}, protocol {entries[0][1].protocol_id}; PSNR of each crop"
    return tag("section", tag("p", about, class_="muted"), tag("div", table, class_="scroll"), class_="kind")


def _figure(image: Image.Image, alt: str, caption: str) -> Markup:
    size = image.width * max(1, -(-SHOWN // image.width))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    picture = tag("img", src=uri("png", buffer.getvalue()), alt=alt, width=size, height=size, class_="pixelated")
    return tag("figure", picture, tag("figcaption", caption))
