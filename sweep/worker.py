"""Runs points: takes those that nobody runs, watches their processes, writes what became of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..conf.compose import compose
from ..conf.space import Dimension, split_space
from ..data.files import alone_in
from ..errors import ConfigError, UserError
from ..evaluate.console import say
from ..evaluate.report.runs import METRICS
from ..train.folder import run_folder
from ..train.signals import EXIT_INTERRUPTED, EXIT_REQUEUE
from .folder import FAILED, FINISHED, INTERRUPTED, PRUNED, RUNNING, TAIL, Claim, Point, SweepFolder, counts
from .points import new_point, numbers, total
from .processes import JOB, Process, fork, share_of_gpus, visible_gpus
from .study import PATIENCE, Study
from .values import ranked, series, value_of

TICK, LOOK_EVERY = 0.1, 0.5
"""Seconds between two looks at the processes, and at the metrics of a point that may be pruned."""
REDRAWS = 20
"""How often Optuna is asked again when it names a point that is there already."""

Launch = Callable[[Sequence[str], Path, IO[str]], Process]


@dataclass
class Running:
    """A point in progress: its claim, its process, its place among those at once, and how far log and metrics were read."""

    claim: Claim
    process: Process
    slot: int
    log_start: int
    looked: float = 0.0
    stamp: int = 0
    step: int = -1
    pruned: bool = field(default=False)

    @property
    def point(self) -> Point:
        """Its record."""
        return self.claim.point


class Worker:
    """Runs points of a sweep until none is left that it may take.

    Args:
        sweep: the folder.
        slots: points at once.
        only: the one point to run; `None` takes any.
        single: run one point, whichever it gets, with its retries.
        launch: starts the ranks of a point, given its overrides, its log and its lock; `None` forks.
    """

    def __init__(
        self, sweep: SweepFolder, *, slots: int = 1, only: int | None = None, single: bool = False, launch: Launch | None = None
    ) -> None:
        self.sweep, self.slots, self.only, self.launch = sweep, slots, only, launch
        self.single = single or only is not None
        self.running: list[Running] = []
        self.stop: int | None = None
        self.waited = False
        plan = sweep.plan
        self.dimensions: list[Dimension] = split_space(plan.space)[1]
        self.study = Study(sweep.path, plan) if plan.settings.method == "tpe" else None

    def run(self) -> int:
        """Run points; returns 0, 1 when one that this worker ran failed for good, 75 or 130 when a signal stopped it.

        Raises:
            UserError: a point has not logged the metric that Optuna needs.
        """
        with self._signals():
            try:
                while self._fill() or self.running or self._others_run():
                    time.sleep(TICK)
                    for each in list(self.running):
                        self._look(each)
            finally:
                self._stop_all(signal.SIGTERM)
        if self.stop is not None:
            return EXIT_INTERRUPTED if self.stop == signal.SIGINT else EXIT_REQUEUE
        points = self.sweep.points()
        mine = [point for point in points if self.only in (None, point.number)]
        return 1 if any(point.state == FAILED for point in mine) else 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals that ask this process to stop go to the points, which save first; no other point is started then."""
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        before = {number: signal.signal(number, lambda number, _: self._pass_on(number)) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int) -> None:
        self.stop = number
        for each in self.running:
            each.process.send_signal(number)

    def _stop_all(self, number: int) -> None:
        """After an error: let what runs save and end, and write it down."""
        if not self.running:
            return
        self._pass_on(number)
        while self.running:
            time.sleep(TICK)
            for each in list(self.running):
                self._look(each)

    # ---- taking points ----

    def _fill(self) -> bool:
        """Start points in the free slots; true when one was started."""
        started = False
        while self.stop is None and len(self.running) < self.slots and (claim := self._next()):
            self._start(claim)
            started = True
        return started

    def _next(self) -> Claim | None:
        points = self.sweep.points()
        free = [point for point in points if point.state != RUNNING and self.sweep.may_start(point)]
        for number in numbers([point for point in free if self.only in (None, point.number)]):
            if claim := self.sweep.claim(number):
                break
        else:
            claim = self._ask() if self.study is not None and self.only is None else None
        if claim is not None and self.single:
            self.only = claim.point.number
        return claim

    def _others_run(self) -> bool:
        """Others run points that might fall to this worker; only one that takes any waits for them."""
        if self.single or self.stop is not None or not (busy := [p for p in self.sweep.points() if p.state == RUNNING]):
            return False
        if not self.waited:
            say(f"waiting for {len(busy)} points that other processes run; Ctrl-C leaves them running")
        self.waited = True
        return True

    def _ask(self) -> Claim | None:
        """A new point from Optuna, when there may be one more."""
        with alone_in(self.sweep.path / "points", PATIENCE):
            points = self.sweep.points()
            number = len(points)
            if number >= total(self.sweep.plan, number):
                return None
            point = self._draw(number, points)
            if point is None:
                say(f"{self.sweep.path}: no new point in {REDRAWS} draws; the space is used up")
                return None
            self.sweep.write(point)
        return self.sweep.claim(number)

    def _draw(self, number: int, points: Sequence[Point]) -> Point | None:
        """A point that is not there yet. Of one that is, Optuna is told the value again."""
        assert self.study is not None
        recorded = [point.trial for point in points if point.trial is not None]
        for attempt in range(REDRAWS):
            trial, values = self.study.ask(self.dimensions, REDRAWS * number + attempt, recorded)
            try:
                composed = compose(self.sweep.plan.stage, [*self.sweep.plan.fixed, *values])
            except ConfigError as error:
                self.study.tell(trial, None)
                say(f"{' '.join(values)}: drawn, but refused: {error}")
                continue
            point = new_point(self.sweep, number, values, composed, trial)
            twin = next((each for each in points if each.run == point.run), None)
            if twin is None:
                return point
            self.study.tell(trial, value_of(run_folder(composed), self.sweep.plan) if twin.state == FINISHED else None)
        return None

    def _start(self, claim: Claim) -> None:
        sweep, plan = self.sweep, self.sweep.plan
        claim.point = sweep.write(
            claim.point, state=RUNNING, starts=claim.point.starts + 1, holder=_holder(), reason="", tail=()
        )
        point, log = claim.point, sweep.log(claim.point)
        overrides = [*plan.fixed, *point.overrides]
        slot = min(set(range(self.slots)) - {each.slot for each in self.running})
        log_start = log.stat().st_size if log.exists() else 0
        again = f", start {point.starts}" if point.starts > 1 else ""
        say(f"{self._progress()} point {point.number}{again}: {point.words} → {sweep.run(point)}")
        process: Process
        if self.launch is not None:
            process = self.launch(overrides, log, claim.lock)
        else:
            gpus = self._gpus(slot, overrides) if self.slots > 1 and visible_gpus() else {}
            process = fork(plan.stage, overrides, log, gpus, [each.claim.lock for each in self.running])
        self.running.append(Running(claim, process, slot, log_start))

    def _gpus(self, slot: int, overrides: Sequence[str]) -> dict[str, str]:
        return share_of_gpus(slot, compose(self.sweep.plan.stage, overrides).typed.strategy.devices)

    def _progress(self) -> str:
        points = self.sweep.points()
        return f"[{sum(point.ended for point in points)}/{total(self.sweep.plan, len(points))}]"

    # ---- watching them ----

    def _look(self, running: Running) -> None:
        code = running.process.poll()
        if code is not None:
            self.running.remove(running)
            try:
                self._ended(running, code)
            finally:
                running.claim.release()
        elif self.sweep.plan.settings.pruning and not running.pruned:
            self._prune(running)

    def _prune(self, running: Running) -> None:
        """Stop a point when Optuna says so, from what it has logged since the last look."""
        if (now := time.monotonic()) - running.looked < LOOK_EVERY:
            return
        running.looked = now
        if self._show(running):
            running.pruned = True
            running.process.send_signal(signal.SIGTERM)

    def _show(self, running: Running) -> bool:
        """Show Optuna what a point has logged since the last look; true when it should stop."""
        if self.study is None or running.point.trial is None:
            return False
        metrics = self.sweep.run(running.point) / METRICS
        stamp = metrics.stat().st_mtime_ns if metrics.exists() else 0
        if stamp == running.stamp:
            return False
        running.stamp = stamp
        found = [item for item in series(metrics.parent, self.sweep.plan.settings.metric) if item[0] > running.step]
        if not found:
            return False
        running.step = found[-1][0]
        return self.study.report(running.point.trial, found)

    def _ended(self, running: Running, code: int) -> None:
        asked = code in (EXIT_REQUEUE, EXIT_INTERRUPTED) or code < 0
        if code == 0:
            self._show(running)
            self._finished(running.point)
        elif running.pruned and asked:
            self.sweep.write(running.point, state=PRUNED, reason=f"pruned at step {running.step}")
            self._tell(running.point, None, pruned=True)
            say(f"{self._progress()} point {running.point.number} pruned at step {running.step}: {running.point.words}")
        elif code in (EXIT_REQUEUE, EXIT_INTERRUPTED) or (asked and self.stop is not None):
            self.sweep.write(running.point, state=INTERRUPTED)
            say(f"{self._progress()} point {running.point.number} interrupted: the same command goes on with it")
            if self.stop is None:  # somebody stopped the point itself: they mean the sweep
                self._pass_on(signal.SIGINT if code == EXIT_INTERRUPTED else signal.SIGTERM)
        else:
            self._failed(running, code)

    def _finished(self, point: Point) -> None:
        plan = self.sweep.plan
        try:
            value = value_of(self.sweep.run(point), plan)
        except UserError as error:
            self.sweep.write(point, state=FINISHED, reason=str(error))
            self._tell(point, None)
            if self.study is not None:
                raise
            sys.stderr.write(f"warning: point {point.number} finished, but {error}\n")
            return
        self._tell(point, value)
        self.sweep.write(point, state=FINISHED)
        best, best_value = ranked(self.sweep)[0]
        words = f"{plan.settings.metric} {value:.6g}; best: point {best.number}, {best_value:.6g}"
        say(f"{self._progress()} point {point.number} finished: {words}")

    def _failed(self, running: Running, code: int) -> None:
        with self.sweep.log(running.point).open("rb") as file:
            file.seek(running.log_start)
            lines = file.read().decode(errors="replace").splitlines()
        tail = tuple(line for line in lines if line.strip())[-TAIL:]
        point = self.sweep.write(running.point, state=FAILED, tries=running.point.tries + 1, reason=exit_words(code), tail=tail)
        if not self.sweep.may_start(point):
            self._tell(point, None)
        sys.stderr.write(failure_words(self.sweep, point) + "\n")
        sys.stderr.flush()

    def _tell(self, point: Point, value: float | None, *, pruned: bool = False) -> None:
        if self.study is not None and point.trial is not None:
            self.study.tell(point.trial, value, pruned=pruned)


def _holder() -> dict[str, Any]:
    job = {name: os.environ[name] for name in JOB if name in os.environ}
    return {"host": socket.gethostname(), "pid": os.getpid(), **job}


def exit_words(code: int) -> str:
    """Why a process ended, from its exit code."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")


def failure_words(sweep: SweepFolder, point: Point) -> str:
    """What a failed point said last, and what happens next."""
    tries = sweep.plan.settings.retries + 1
    more = "it is tried again" if sweep.may_start(point) else f"try it again with sweep.retries={point.tries}"
    head = f"tokar: point {point.number} failed ({point.reason}, try {point.tries} of {tries}; {more}): {point.words}"
    return "\n".join([head, *(f"    {line}" for line in point.tail), f"    … {sweep.log(point)}"])


def summary(sweep: SweepFolder) -> str:
    """How the sweep stands, in one line."""
    found = ranked(sweep)
    best = f"; best: point {found[0][0].number}, {sweep.plan.settings.metric} {found[0][1]:.6g}" if found else ""
    return f"{sweep.path}: {counts(sweep.points())}{best}"
