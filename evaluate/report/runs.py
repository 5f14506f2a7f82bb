"""What a run folder holds, read for the report: everything optional, nothing silently wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from omegaconf import OmegaConf

from ...errors import UserError
from ..protocol import Result

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIG, ENVIRONMENT, METRICS, TIMING = "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl"
DRAWN_HERE = ("_crops", "_curves", "_speed_and_quality")
"""Ends of the names of pictures beside results that the page draws itself, from the numbers."""
PLAN, CODES = "plan.json", "codes.npz"
SAMPLERS = ("generator", "distill", "diffusion", "dd2")
"""Stages whose runs draw images, and so stand in one plane of speed and quality."""
MARKS = (CONFIG, METRICS, "evaluation", "samples")

Row = dict[str, Any]


@dataclass
class Run:
    """One run folder.

    Args:
        folder: where it lies.
        name: the shortest end of its path that no other run of the report has.
        colour: index in the palette: colour tells runs of one stage, and all that draw images, apart.
        stage: `tokenizer`, `generator`, `classifier`, …; empty when the config does not say.
        config: resolved, parsed.
        config_text: as written.
        environment: versions, commit, command, start.
        metrics: rows of deterministic values, one for each logged step.
        events: what happened to it (steps left out, ways back), with `step`, `event` and `reason`, as they came.
        timing: rows of speeds.
        results: evaluation files with their names, oldest first.
        pictures: files of `samples/`, and those drawn by evaluations.
        plan: the order in which a generator reveals its tokens (see docs/formats.md); empty for other runs.
        counts: how often each code was used at the last validation, `[V]` for each stream by name, `codes` of all together.
        notes: what could not be read, one line each; shown on the page.
    """

    folder: Path
    name: str
    colour: int = 0
    stage: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)
    results: list[tuple[str, Result]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The newest step with a metric."""
        return self.metrics[-1]["step"] if self.metrics else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        UserError: no folder was given, or one is no run.
    """
    if not folders:
        raise UserError("no run to report on", fix="give one or more run folders")
    runs = [read_run(folder) for folder in folders]
    for run, name in zip(runs, _short_names([run.folder for run in runs]), strict=True):
        run.name = name
    seen: Counter[str] = Counter()
    for run in runs:
        family = SAMPLERS[0] if run.stage in SAMPLERS else run.stage
        run.colour = seen[family]
        seen[family] += 1
    return runs


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        UserError: it is no run.
    """
    folder = Path(folder)
    if not any((folder / mark).exists() for mark in MARKS):
        raise UserError("is no run folder", where=folder, fix="give a folder that holds config.yaml or metrics.jsonl")
    run = Run(folder, folder.name)
    _read_config(run)
    _read_environment(run)
    run.metrics, run.timing = _read_rows(run, METRICS), _read_rows(run, TIMING)
    for path in sorted(folder.glob("evaluation/*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            run.results.append((path.stem, Result.load(path)))
        except UserError as error:
            run.notes.append(f"evaluation/{path.name} left out: {error.what}")
    run.pictures = sorted(folder.glob("samples/*.png"))
    drawn = sorted(folder.glob("evaluation/*.png"))
    run.pictures += [path for path in drawn if not path.stem.endswith(DRAWN_HERE)]
    _read_plan(run)
    _read_counts(run)
    return run


def _short_names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is given twice", where=folders[0], fix="give each run once")


def _read_config(run: Run) -> None:
    path = run.folder / CONFIG
    if not path.exists():
        return
    try:
        run.config_text = path.read_text()
        content = OmegaConf.to_container(OmegaConf.create(run.config_text))
    except Exception as error:  # yaml and omegaconf raise unrelated families
        run.notes.append(f"{CONFIG} is shown as text: {str(error).splitlines()[0]}")
        return
    if isinstance(content, dict):
        run.config = {str(key): value for key, value in content.items()}
        run.stage = str(run.config.get("stage") or "")


def _read_environment(run: Run) -> None:
    path = run.folder / ENVIRONMENT
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        run.notes.append(f"{ENVIRONMENT} left out: not JSON")
        return
    run.environment = content if isinstance(content, dict) else {}


def _read_plan(run: Run) -> None:
    path = run.folder / PLAN
    if not path.exists():
        return
    try:
        plan = json.loads(path.read_text())
        if plan["format"] == 1 and all(stream["name"] and stream["revealed_at"] for stream in plan["streams"]):
            run.plan = {**plan, "n_units": int(plan["n_units"])}
    except (OSError, ValueError, KeyError, TypeError):
        run.notes.append(f"{PLAN} left out: no readable plan")


def _read_counts(run: Run) -> None:
    path = run.folder / CODES
    if not path.exists():
        return
    import numpy as np

    try:
        with np.load(path) as counts:
            run.counts = {name: counts[name] for name in counts.files if counts[name].any()}
    except (OSError, ValueError, BadZipFile):
        run.notes.append(f"{CODES} left out: no readable counts")


def _read_rows(run: Run, name: str) -> list[Row]:
    """Rows by step; lines on events go to the run's."""
    found, broken = rows(run.folder / name, run.events)
    if broken:
        run.notes.append(f"{broken} unreadable line{'s' if broken > 1 else ''} of {name} left out")
    return found


def rows(path: Path, events: list[Row] | None = None) -> tuple[list[Row], int]:
    """Rows by step, the newest line of a step winning: a run that went back to a checkpoint took the steps behind it again.

    Args:
        path: of a file of metrics or timing.
        events: takes the lines on events, which are no rows.

    Returns:
        The rows, none for a file that is not there, and how many lines could not be read.
    """
    if not path.exists():
        return [], 0
    found: dict[int, Row] = {}
    broken = 0
    for line in path.read_text(errors="replace").splitlines():
        row = _parse(line)
        if row is None:
            broken += bool(line.strip())
        elif "event" not in row:
            found[row["step"]] = {**found.get(row["step"], {}), **row}
        elif events is not None:
            events.append(row)
    return [found[step] for step in sorted(found)], broken


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
