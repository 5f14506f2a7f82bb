"""Tables of the page: results under their protocols, the config, the environment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

from ..protocol import Result
from .markup import Markup, breakable, join, tag
from .names import better, label
from .runs import Run, flatten

MOST_EVENTS = 50
ROW, WAY = "row", "way"
"""Facts that name what was measured by themselves: a row of a result, a way of sampling among those compared."""
OVERALL = ""
"""The row of numbers that have none in their name."""


class Entry(NamedTuple):
    """One row of a table of results."""

    run: Run
    file: str
    result: Result

    @property
    def facts(self) -> dict[str, Any]:
        """Of what was measured, by dotted key."""
        return flatten(self.result.subject)


def swatch(of: Run | int) -> Markup:
    """The mark of a run, or of a number of the palette: colour and shape, as in the curves."""
    colour = of if isinstance(of, int) else of.colour
    return tag("span", class_=f"swatch c{colour % 6}", aria_hidden="true")


def number(value: float, decimals: int | None = None) -> str:
    """Four significant digits, or as many decimals as the rest of its column has."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:.{_decimals([value]) if decimals is None else decimals}f}"


def spaced(count: int) -> str:
    """A whole number with thin spaces between its thousands."""
    return f"{count:,}".replace(",", "\u2009")


def _decimals(values: Iterable[float]) -> int:
    """Decimals that leave the smallest value four significant digits, or three below 0.1, five at most, so points align."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    if not sizes or all(size.is_integer() for size in sizes):
        return 0
    return max(0, min(5, (3 if min(sizes) >= 0.1 else 2) - math.floor(math.log10(min(sizes)))))


def rows_of(result: Result) -> dict[str, dict[str, float]]:
    """Finite numbers by row: `teacher/fd_classifier` is the metric `fd_classifier` of the row `teacher`."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in result.numbers.items():
        row, _, metric = key.rpartition("/")
        if math.isfinite(value):
            rows.setdefault(row, {})[metric] = value
    return rows


def _by_row(entry: Entry) -> list[Entry]:
    """A result whose numbers are all of rows, one entry for each; else as it is."""
    rows = rows_of(entry.result)
    if OVERALL in rows or len(rows) < 2:
        return [entry]
    parts = ((name, replace(entry.result, numbers=values)) for name, values in rows.items())
    return [entry._replace(result=replace(part, subject={ROW: name, **part.subject})) for name, part in parts]


def results(runs: Sequence[Run]) -> Markup:
    """One sortable table for each kind of evaluation, protocols below; empty without results."""
    entries = [Entry(run, file, result) for run in runs for file, result in run.results]
    kinds = dict.fromkeys(entry.result.name for entry in entries)
    return join(_kind(kind, [entry for entry in entries if entry.result.name == kind]) for kind in kinds)


def _kind(kind: str, whole: Sequence[Entry]) -> Markup:
    entries = [part for entry in whole for part in _by_row(entry)]
    metrics = list(dict.fromkeys(key for entry in entries for key in entry.result.numbers))
    subjects = telling(entries)
    named = _needs_file(entries, subjects)
    head = [_heading("Run"), *([_heading("File")] if named else []), *(_subject_heading(key, entries) for key in subjects)]
    head += [_heading(label(key), better(key)) for key in metrics]
    head += [_heading("Images", numeric=True), _heading("Protocol")]
    best = _best(entries, metrics)
    places = {key: _decimals(entry.result.numbers.get(key, math.nan) for entry in entries) for key in metrics}
    rows = [_row(entry, subjects, places, best, named) for entry in entries]
    protocols: dict[str, list[Entry]] = {}
    for entry in whole:
        protocols.setdefault(entry.result.protocol_id, []).append(entry)
    warning = (
        tag("p", f"{len(protocols)} protocols: compare numbers of one only.", class_="warning") if len(protocols) > 1 else ""
    )
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="results")
    return tag(
        "section",
        tag("h3", kind.replace("_", " ").replace("ar probe", "AR probe")),
        warning,
        tag("div", table, class_="scroll"),
        *(_protocol(name, protocols) for name in protocols),
        class_="kind",
    )


def _heading(text: str, direction: str = "", numeric: bool = False) -> Markup:
    title = {"↑": "higher is better", "↓": "lower is better"}.get(direction)
    mark = tag("span", direction, class_="direction", title=title) if direction else ""
    button = tag("button", text, mark, tag("span", class_="order", aria_hidden="true"), type="button")
    return tag("th", button, scope="col", class_="number" if direction or numeric else None, data_better=direction or None)


def telling(entries: Sequence[Entry]) -> list[str]:
    """Facts about the measured thing that tell rows apart; the rest stands under the table, with hashes and paths of runs."""
    flat = [entry.facts for entry in entries]
    keys = dict.fromkeys(key for values in flat for key in values)
    short = [key for key in keys if all(isinstance(values.get(key), str | int | float | None) for values in flat)]
    varying = [key for key in short if len({values.get(key) for values in flat}) > 1]
    return [
        key
        for key in varying
        if key in (ROW, WAY)
        or not any(_is_dull(str(values.get(key)), entry) for values, entry in zip(flat, entries, strict=True))
    ]


def _is_dull(value: str, entry: Entry) -> bool:
    return len(value) > 24 or entry.run.name in value or bool(re.fullmatch("[0-9a-f]{8,}", value))


def _subject_heading(key: str, entries: Sequence[Entry]) -> Markup:
    values = [entry.facts.get(key) for entry in entries]
    return _heading(label(key.replace(".", "/")), numeric=all(value is None or _is_number(value) for value in values))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _needs_file(entries: Sequence[Entry], subjects: Sequence[str]) -> bool:
    """Whether two rows would look the same without the name of their file."""
    facts = [entry.facts for entry in entries]
    seen = [
        (entry.run.name, entry.result.protocol_id, *(str(values.get(key)) for key in subjects))
        for entry, values in zip(entries, facts, strict=True)
    ]
    return len(set(seen)) < len(seen)


def _best(entries: Sequence[Entry], metrics: Sequence[str]) -> set[tuple[int, str]]:
    """Rows (by identity of their result) that lead a metric among at least two of their protocol."""
    leaders = set()
    for protocol in {entry.result.protocol_id for entry in entries}:
        rivals = [entry.result for entry in entries if entry.result.protocol_id == protocol]
        for key in metrics:
            values = {id(result): result.numbers[key] for result in rivals if math.isfinite(result.numbers.get(key, math.nan))}
            if better(key) and len(set(values.values())) > 1:
                pick = max if better(key) == "↑" else min
                leaders |= {(name, key) for name, value in values.items() if value == pick(values.values())}
    return leaders


def _row(entry: Entry, subjects: Sequence[str], places: Mapping[str, int], best: set[tuple[int, str]], named: bool) -> Markup:
    facts = entry.facts
    cells = [tag("th", swatch(entry.run), breakable(entry.run.name), scope="row", title=entry.file)]
    cells += [tag("td", entry.file)] if named else []
    cells += [_cell(facts.get(key)) for key in subjects]
    for key, decimals in places.items():
        value = entry.result.numbers.get(key, math.nan)
        leads = (id(entry.result), key) in best
        shown = tag("strong", number(value, decimals), title="best of this protocol") if leads else number(value, decimals)
        cells.append(tag("td", shown, class_="number", data_value=repr(value) if math.isfinite(value) else ""))
    cells.append(_cell(entry.result.protocol.get("count")))
    name = entry.result.protocol_id
    cells.append(tag("td", tag("a", name, href=f"#protocol-{name}", class_="protocol-id")))
    return tag("tr", *cells)


def _cell(value: object) -> Markup:
    if _is_number(value):
        return tag("td", f"{value:g}" if isinstance(value, float) else value, class_="number", data_value=repr(float(value)))
    return tag("td", "–" if value is None else str(value))


def _protocol(name: str, protocols: Mapping[str, Sequence[Entry]]) -> Markup:
    """A protocol in full, what other protocols of the table have differently marked, and all that was measured by it."""
    mine = flatten(protocols[name][0].result.protocol)
    rest = [flatten(entries[0].result.protocol) for other, entries in protocols.items() if other != name]
    differing = {key for key in mine if any(values.get(key) != mine[key] for values in rest)}
    parts = [_facts(mine, differing)]
    for run, file, result in protocols[name]:
        versions = ", ".join(f"{package} {version}" for package, version in result.environment.items())
        parts += [
            tag("h4", swatch(run), f"{run.name}, {file}"),
            _facts({**flatten(result.subject), "versions": versions}, set()),
        ]
    return tag("details", tag("summary", "Protocol ", tag("code", name)), *parts, id=f"protocol-{name}", class_="protocol")


def _facts(values: Mapping[str, Any], marked: set[str]) -> Markup:
    pairs: Iterable[Markup] = (
        tag("div", tag("dt", key), tag("dd", _plain(value)), class_="differs" if key in marked else None)
        for key, value in values.items()
    )
    return tag("dl", *pairs, class_="facts")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def events(runs: Sequence[Run]) -> Markup:
    """What happened to the runs: steps left out, ways back; the newest of each."""
    rows = []
    for run in runs:
        for event in run.events[-MOST_EVENTS:]:
            facts = [str(event.get(key, "")) for key in ("step", "event", "reason")]
            rows.append(tag("tr", tag("td", swatch(run), run.name), *(tag("td", fact) for fact in facts)))
    if not rows:
        return Markup("")
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Run", "Step", "Event", "Reason")))
    more = [f"{run.name}: the newest {MOST_EVENTS} of {len(run.events)}" for run in runs if len(run.events) > MOST_EVENTS]
    notes = tag("p", "; ".join(more), class_="muted") if more else ""
    return join([tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="plain"), class_="scroll"), notes])


def environment(runs: Sequence[Run]) -> Markup:
    """Facts about where and how the runs were made, one column each; empty without any."""
    return _columns([run for run in runs if run.environment], lambda run: flatten(run.environment), "environment")


def config_differences(runs: Sequence[Run]) -> Markup:
    """What the configs of the runs of one stage have differently; empty for stages with one run."""
    tables = []
    for stage in dict.fromkeys(run.stage for run in runs):
        peers = [run for run in runs if run.stage == stage and run.config]
        if len(peers) < 2:
            continue
        flat = {run.name: flatten(run.config) for run in peers}
        keys = list(dict.fromkeys(key for values in flat.values() for key in values))
        differing = [key for key in keys if any(flat[run.name].get(key) != flat[peers[0].name].get(key) for run in peers)]
        if differing:
            tables.append(tag("h3", f"{stage} runs differ in".strip()))
            tables.append(
                _columns(peers, lambda run, flat=flat, keys=differing: {key: flat[run.name].get(key) for key in keys}, "")
            )
    return join(tables)


def _columns(runs: Sequence[Run], facts: Any, name: str) -> Markup:
    values = [facts(run) for run in runs]
    keys = list(dict.fromkeys(key for column in values for key in column))
    if not keys:
        return Markup("")
    head = tag("tr", tag("th", "", scope="col"), *(tag("th", swatch(run), run.name, scope="col") for run in runs))
    rows = []
    for key in keys:
        cells = [_plain(column[key]) if key in column else "–" for column in values]
        differs = "differs" if name and len(set(cells)) > 1 else None
        name_of_row = tag("th", breakable(key), scope="row")
        rows.append(tag("tr", name_of_row, *(tag("td", cell) for cell in cells), class_=differs))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_=f"plain {name}".strip()), class_="scroll")


def configs(runs: Sequence[Run]) -> Markup:
    """Each resolved config, folded."""
    return join(
        tag(
            "details",
            tag("summary", swatch(run), run.name),
            tag(
                "div",
                tag("button", "Copy", type="button", class_="copy"),
                tag("pre", _coloured(run.config_text)),
                class_="code",
            ),
        )
        for run in runs
        if run.config_text
    )


def _coloured(text: str) -> Markup:
    """YAML with its keys and comments set apart."""
    lines = []
    for line in text.rstrip().splitlines():
        match = re.fullmatch(r"(\s*(?:- )?)([\w.\"'-]+)(:)(.*)", line)
        if line.lstrip().startswith("#"):
            lines.append(tag("i", line))
        elif match:
            lines.append(join([match[1], tag("b", match[2]), match[3], match[4]]))
        else:
            lines.append(join([line]))
    return Markup("\n".join(lines))
