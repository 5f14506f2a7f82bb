"""Metrics in plain files, always; Weights & Biases and a progress bar beside them.

`metrics.jsonl` holds only what is a pure function of the config (losses, rates, measures), so that a resumed run writes
the very same bytes as one that was never stopped; what depends on the machine (speeds, waits) goes to `timing.jsonl`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.spine import Wandb as WandbConfig
from ..errors import UserError
from ..evaluate.reconstruction import usage_and_perplexity
from .clock import Clock

METRICS_NAME, TIMING_NAME = "metrics.jsonl", "timing.jsonl"


class Meters:
    """Weighted sums of metrics on the device over the steps since the last log; no synchronisation until they are read.

    A scalar is averaged. A vector is a histogram of codes: it becomes its usage (share of codes used) and its
    perplexity exp(-Σ p log p). How much of the codebook so few tokens could have used at most is in `reach`, the histograms
    read last are in `histograms`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.reach: dict[str, float] = {}
        self.histograms: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor], weight: float) -> None:
        """Add metrics of a micro-batch that makes up the share `weight` of this rank's part of the step."""
        for name, value in metrics.items():
            value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            scaled = value if value.ndim else torch.stack([value * weight, torch.full_like(value, weight)])
            key = f"{name}#" if value.ndim else name
            self.sums[key] = self.sums[key] + scaled if key in self.sums else scaled

    def add_step(self, step: Meters, bad: Tensor) -> None:
        """Add what a step collected, or nothing where the flag `bad` `[]` is set; decided on the device."""
        for key, total in step.sums.items():
            kept = torch.where(bad, torch.zeros_like(total), total)
            self.sums[key] = self.sums[key] + kept if key in self.sums else kept

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Metrics by name, reduced over ranks by `reduce` (a sum), without those of bad steps only; clears the sums."""
        found: dict[str, float] = {}
        self.histograms = {}
        for key, total in sorted(self.sums.items()):
            total = reduce(total)
            if not (total if key.endswith("#") else total[1]).any():
                continue
            if key.endswith("#"):
                usage, perplexity = usage_and_perplexity(total)
                self.histograms[key[:-1]] = total
                self.reach[f"{key[:-1]}/usage"] = min(1.0, float(total.sum()) / len(total))
                found |= {f"{key[:-1]}/usage": usage, f"{key[:-1]}/perplexity": perplexity}
            else:
                found[key] = float(total[0] / total[1])
        self.sums = {}
        return found


class MetricsFile:
    """A file of JSON lines that restarts cleanly after a kill.

    Args:
        path: of the file.
        last: data position that the run goes on from; what was written behind it will be written again. (Not its step:
            a run that went back to a checkpoint has counted some steps twice, but no sample.)
    """

    def __init__(self, path: Path, last: int) -> None:
        self.path = path
        kept = [line for line in _whole_lines(path) if line["samples"] <= last]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, clock: Clock, values: Mapping[str, Any]) -> None:
        """Append one record; one with the key `event` tells what happened to the run instead of how it goes."""
        self._file.write(json.dumps({"step": clock.step, "samples": clock.samples, **values}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a kill of the machine; called before a checkpoint counts."""
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file without lines that a kill cut short."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"step", "samples"} <= record.keys():
            records.append(record)
    return records


class Wandb:
    """Weights & Biases; the id lies in the run folder, so a restart goes on with the same run."""

    def __init__(self, config: WandbConfig, folder: Path, name: str, plain: Mapping[str, Any]) -> None:
        self._run = None
        if config.mode == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb is not installed", where=f"logger.wandb.mode={config.mode}", fix="pip install wandb"
            ) from error
        identity = folder / "wandb" / "id"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            id=identity.read_text().strip(), resume="allow", mode=config.mode, project=config.project, entity=config.entity,
            tags=config.tags, name=name, dir=folder, config=dict(plain), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # W&B counts its own steps from 0 after an offline restart: every chart is drawn over ours instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def silent(cls) -> Wandb:
        """One that logs nothing: for ranks other than 0."""
        return cls(WandbConfig(), Path(), "", {})

    def write(self, clock: Clock, values: Mapping[str, Any]) -> None:
        """Log values at the clock's step."""
        if self._run is not None:
            self._run.log({"step": clock.step, "samples": clock.samples, **values})

    def write_picture(self, clock: Clock, name: str, path: Path) -> None:
        """Log an image file."""
        if self._run is not None:
            self.write(clock, {name: self._wandb.Image(str(path))})

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()


class Progress:
    """A live bar on a terminal, a line now and then elsewhere; nothing on other ranks."""

    LINE_EVERY = 15.0
    """Seconds between lines where there is no terminal."""

    def __init__(self, title: str, clock: Clock, *, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(quiet=not enabled, soft_wrap=True)
        self._title, self._note, self._said = title, "", time.monotonic()
        columns = [TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}")]  # fmt: skip
        live = enabled and self._console.is_terminal
        self._bar = Bar(*columns, console=self._console) if live else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=clock.total, completed=clock.step, note="")

    def update(self, clock: Clock, note: str) -> None:
        """Show where the run is; an empty note keeps the last one."""
        if self._bar is not None:
            self._note = note or self._note
            self._bar.update(self._task, completed=clock.step, note=self._note)
        elif note and (time.monotonic() - self._said >= self.LINE_EVERY or clock.finished):
            self._said = time.monotonic()
            self._console.print(f"{self._title}  step {clock.step}/{clock.total}  {note}", highlight=False)

    def say(self, line: str) -> None:
        """Print one line without harming the bar."""
        self._console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
