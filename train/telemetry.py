"""What a run does with its machine: speeds, memory, FLOPs and waiting. It goes to timing.jsonl, W&B and the progress line."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.tokenizers.layout import TokenLayout
from .clock import Clock
from .cost import Twin
from .peaks import peak_flops
from .profiler import Windows
from .stage import Batch, Stage
from .strategy import Workers

PATIENCE = 10.0
"""Seconds of training before the FLOPs of a step are worth counting, which takes one to a few."""

Phase = tuple[tuple[str, ...], tuple[tuple[str, torch.Size, torch.dtype], ...]]
"""What a micro-batch did, told by the names of its losses, and the shapes it did it on: its FLOPs follow from that."""


class Stopwatch:
    """Seconds of the steps since the last reading, and how many of them went into waiting for data."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited, self.steps, self.samples = 0.0, 0, 0

    def step(self, samples: int, waited: float) -> None:
        """Count one step."""
        self.steps, self.samples, self.waited = self.steps + 1, self.samples + samples, self.waited + waited

    def read(self) -> dict[str, float]:
        """Speeds since the last reading; restarts the watch."""
        elapsed = time.perf_counter() - self.start
        values = {
            "images_per_s": self.samples / elapsed,
            "step_ms": 1000 * elapsed / max(1, self.steps),
            "data_wait": self.waited / elapsed,
        }
        self.__init__()  # type: ignore[misc]
        return values


class Lead:
    """Time from the beginning of a step to the end of its first forward: what a rank does before it can wait for others.

    On a GPU it is taken by events on the stream, which are read when a log is written; no step waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._open: Any = None
        self._done: list[Any] = []

    def begin(self) -> None:
        """A step begins."""
        self._open = self._now()

    def forward_done(self, *_: Any) -> None:
        """A forward ended (a hook of the main network): the step's first one counts."""
        if self._open is not None:
            self._done.append((self._open, self._now()))
            self._open = None

    def read(self) -> float:
        """Mean milliseconds of the steps since the last reading; 0 when there were none."""
        done, self._done = self._done, []
        if self._gpu and done:
            done[-1][1].synchronize()
        spans = [start.elapsed_time(end) if self._gpu else 1000 * (end - start) for start, end in done]
        return sum(spans) / len(spans) if spans else 0.0

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Flops:
    """Model FLOPs of the steps since the last reading: counted once for each kind of step, on a twin without values.

    Args:
        twin: of the stage; `None`: nothing is counted.
    """

    def __init__(self, twin: Twin | None) -> None:
        self.twin = twin
        self._seen: Counter[Phase] = Counter()
        self._clocks: dict[Phase, Clock] = {}
        self._costs: dict[Phase, tuple[int, int]] = {}

    def micro_batch(self, batch: Batch, losses: Mapping[str, Tensor], clock: Clock) -> None:
        """Count a micro-batch of the step that `clock` stands before."""
        shapes = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        phase = tuple(losses), shapes
        self._seen[phase] += 1
        self._clocks.setdefault(phase, clock)

    def read(self) -> tuple[int, int]:
        """FLOPs of the trained networks and of the frozen ones since the last reading; zeros when they cannot be told."""
        seen, self._seen = self._seen, Counter()
        try:
            costs = [(number, self._cost(phase)) for phase, number in seen.items()] if self.twin is not None else []
        except RuntimeError:  # a part that looks at values has no twin, and training goes on without these numbers
            self.twin = None
            costs = []
        return sum(number * cost[0] for number, cost in costs), sum(number * cost[1] for number, cost in costs)

    def _cost(self, phase: Phase) -> tuple[int, int]:
        if phase not in self._costs:
            assert self.twin is not None
            cost = self.twin.cost({name: (shape, dtype) for name, shape, dtype in phase[1]}, self._clocks[phase])
            self._costs[phase] = cost.flops, cost.frozen_flops
        return self._costs[phase]


class Telemetry:
    """Everything about the machine between two logs. Ranks talk only when a log is written.

    Args:
        stage: as it was built, before its networks went to their devices.
        workers: the processes.
        windows: of the profiler.
    """

    def __init__(self, stage: Stage, workers: Workers, windows: Windows) -> None:
        self.workers, self.windows = workers, windows
        self.precision = workers.config.precision
        self.lead, self.flops = Lead(workers.device), Flops(Twin(stage, self.precision))
        self._main, facts = next((name, item.facts) for name, item in stage.trainables.items())
        layout = (facts or {}).get("layout")
        self.tokens = TokenLayout.from_dict(layout).total_tokens if layout else 0
        self._peak: float | None = None

    def attach(self, networks: Mapping[str, Any], clock: Clock) -> None:
        """Meet the networks in training, at the beginning of a fit."""
        self.windows.boundary(clock.step, clock.finished)
        networks[self._main].engine.wrapped.register_forward_hook(self.lead.forward_done)
        self.watch, self._fit_begun = Stopwatch(), time.perf_counter()

    def begin(self) -> float:
        """A step begins; returns the time."""
        self.lead.begin()
        return time.perf_counter()

    def micro_batch(self, batch: Batch, losses: Mapping[str, Tensor], clock: Clock) -> None:
        """A micro-batch was done."""
        self.flops.micro_batch(batch, losses, clock)

    def step(self, clock: Clock, waited: float) -> None:
        """A step was done: `clock` stands behind it, and data were waited for so many seconds."""
        self.watch.step(clock.batch_size, waited)
        self.windows.boundary(clock.step, clock.finished)

    def read(self) -> dict[str, float]:
        """Values since the last reading, by name; collective.

        `images_per_s`, `tokens_per_s`: of all ranks. `step_ms`. `data_wait`: share of the time, of the rank that waited most.
        `tflops`, `frozen_tflops`: TFLOP/s of this rank in trained and in frozen networks; `mfu`: the former over the device's
        peak (`peaks.py`), both without recomputed activations. `memory_mib`, `memory_now_mib`: peak and present, of this rank;
        `memory_max_mib`: peak of the fullest rank. `imbalance`: slowest over fastest rank's time from the beginning of a step
        to the end of its first forward (`Lead`): a whole step takes equally long everywhere, since ranks wait for each other;
        networks that are gathered in their forward (FSDP, ZeRO-3) wait there already, so it says less of them.
        `communication`, `communication_exposed`: of the profiler's window that ended meanwhile, on this rank.
        """
        steps = self.watch.steps
        values = self.watch.read()
        if self.tokens:
            values["tokens_per_s"] = values["images_per_s"] * self.tokens
        values |= memory(self.workers.device) | self.windows.read()
        values |= self._ranks(values)
        if time.perf_counter() - self._fit_begun > PATIENCE:
            values |= self._speeds(steps * values["step_ms"] / 1000)
        return values

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Inside, time goes into something else than steps."""
        begun = time.perf_counter()
        yield
        self.watch.start += time.perf_counter() - begun

    def _speeds(self, seconds: float) -> dict[str, float]:
        own, frozen = self.flops.read()
        if not own:
            return {}
        if self._peak is None:
            self._peak = peak_flops(self.workers.device, self.precision)
        found = {"tflops": own / seconds / 1e12, "mfu": own / seconds / self._peak}
        return found | ({"frozen_tflops": frozen / seconds / 1e12} if frozen else {})

    def _ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """What only all ranks together can tell."""
        lead = self.lead.read()
        if self.workers.world == 1:
            return {}
        table = torch.zeros(3, self.workers.world, dtype=torch.float64, device=self.workers.device)
        table[:, self.workers.rank] = torch.tensor([lead, values["data_wait"], values["memory_mib"]])
        leads, waits, peaks = self.workers.sum(table).cpu()
        found = {"data_wait": float(waits.max()), "memory_max_mib": float(peaks.max())}
        return found | ({"imbalance": float(leads.max() / leads.min())} if leads.min() > 0 else {})


def note(values: Mapping[str, float]) -> str:
    """The values that the progress line has room for."""
    parts = [f"{values['images_per_s']:.0f} images/s"]
    parts += [f"MFU {100 * values['mfu']:.0f} %"] if "mfu" in values else []
    return "  ".join(parts)


def forget_peak(device: torch.device) -> None:
    """Let `memory` begin anew from what is in use now; where the system cannot, it goes on from the process's start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(device: torch.device) -> dict[str, float]:
    """Peak and present memory in MiB: of the GPU's allocator, or the resident set of the process."""
    if device.type == "cuda":
        peak, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return {"memory_mib": peak / 2**20, "memory_now_mib": now / 2**20}
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = {key: int(size) / 1024 for key, size in re.findall(r"(VmHWM|VmRSS):\s*(\d+) kB", text)}
    if len(found) == 2:
        return {"memory_mib": found["VmHWM"], "memory_now_mib": found["VmRSS"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, in KiB elsewhere
    return {"memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}
