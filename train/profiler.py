"""Windows of steps under torch's profiler: a trace, the dearest operations, and how much of the time was communication."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from ..conf.spine import Profile

DEAREST = 10
"""Rows of the table of operations."""
COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
"""How the names of what moves data between ranks begin: gloo's on the host, NCCL's kernels on a GPU."""

Span = tuple[float, float]
Found = TypeVar("Found")


class Windows:
    """Profiles `steps` steps from step `start` on, and again every so many, on the first ranks.

    Writes `profile/step-…-rank-….json.gz` (open it in Perfetto or chrome://tracing) and `….txt`, the ten operations that
    took longest themselves.

    Args:
        config: when and what.
        folder: of the run.
        rank: this process.
        device: of its work.
    """

    def __init__(self, config: Profile, folder: Path, rank: int, device: torch.device) -> None:
        self.config, self.folder, self.rank, self.device = config, folder / "profile", rank, device
        self._running: profile | None = None
        self._begun = 0
        self._found: dict[str, float] = {}

    def boundary(self, step: int, last: bool = False) -> None:
        """Begin or end a window between two steps.

        Args:
            step: steps done.
            last: the run ends here.
        """
        if self._running is not None and (step >= self._begun + self.config.steps or last):
            self._end()
        if not last and self._running is None and self._is_start(step):
            self._begin(step)

    def read(self) -> dict[str, float]:
        """Shares of communication in the window that ended since the last reading, see `communication`; empty without one."""
        found, self._found = self._found, {}
        return found

    def _is_start(self, step: int) -> bool:
        config = self.config
        if not config.steps or self.rank >= config.ranks or step < config.start:
            return False
        return step == config.start if config.every is None else (step - config.start) % config.every == 0

    def _begin(self, step: int) -> None:
        self._running, self._begun = _recorder(self.device, self.config.memory), step
        self._running.start()

    def _end(self) -> None:
        assert self._running is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._running.stop()
        self._found = communication(self._running.events())
        _keep(self._running, self.folder / f"step-{self._begun:08d}-rank-{self.rank}", self.device)
        self._running = None


def _recorder(device: torch.device, memory: bool = False) -> profile:
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    return profile(activities=kinds, profile_memory=memory, record_shapes=memory)


def _keep(recorded: profile, path: Path, device: torch.device) -> None:
    """Write the trace and the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=key, row_limit=DEAREST, max_name_column_width=60)
    path.with_name(f"{path.name}.txt").write_text(table + "\n")
    recorded.export_chrome_trace(f"{path}.json.gz")


def profiled(work: Callable[[], object], path: Path, device: torch.device) -> None:
    """Do `work` under the profiler; writes `PATH.json.gz`, the trace, and `PATH.txt`, the ten dearest operations."""
    with _recorder(device) as recorded:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    _keep(recorded, path, device)


def communication(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Shares of a window's time, by its events.

    `communication`: a collective was under way. `communication_exposed`: one was, and nothing was computed meanwhile, so the
    step waited for it. On a GPU both are times of kernels; on CPU ranks a collective is under way from its call to its end,
    so waiting for a slower rank counts, and computing is any operator of torch. Both are 0 for one rank.
    """
    seen = list(events)
    on_gpu = [event for event in seen if event.device_type == torch.autograd.DeviceType.CUDA]
    timed = on_gpu or [event for event in seen if event.name != "[memory]"]
    spans = [(event.time_range.start, event.time_range.end) for event in timed]
    if not spans:
        return {}
    moving = [event.name.startswith(COLLECTIVES) for event in timed]
    working = [on_gpu or event.name.startswith("aten::") for event in timed]
    moved = _union(span for span, is_moving in zip(spans, moving, strict=True) if is_moving)
    worked = _union(s for s, is_moving, is_work in zip(spans, moving, working, strict=True) if is_work and not is_moving)
    length = max(end for _, end in spans) - min(start for start, _ in spans)
    total, hidden = _length(moved), _length(moved) + _length(worked) - _length(_union([*moved, *worked]))
    return {"communication": total / length, "communication_exposed": (total - hidden) / length}


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as disjoint spans."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def most_held(work: Callable[[], Found], device: torch.device) -> tuple[Found, int]:
    """What `work` returns, and the most bytes that torch's allocator for the device held meanwhile."""
    if device.type != "cuda":
        return allocated_peak(work)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    return result, torch.cuda.max_memory_allocated(device)


def allocated_peak(work: Callable[[], Found]) -> tuple[Found, int]:
    """What `work` returns, and the most bytes that torch's CPU allocator held for it at once, whoever asked for them.

    Exact where the process's resident set is not: neither the interpreter nor what the allocator keeps for later counts.
    Under another profiler it is 0: torch has one at a time, and a second ends the process.
    """
    if torch.autograd._profiler_enabled():
        return work(), 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
    assert watched.profiler is not None
    assert watched.profiler.kineto_results is not None
    sizes = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(sizes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
