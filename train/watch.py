"""A thread that ends a run when one of its processes died, or when no step has ended for too long.

Processes that wait for a dead one in a collective would wait until its timeout. Who finds the dead one depends on who started
them:

* `tokar train strategy.devices=N` starts ranks 1 … N-1 of its machine itself. It names the one that died, ends the others and
  itself. When it dies, they end.
* `torchrun` polls its processes: when one dies it sends SIGTERM to the others, which a rank in a collective cannot heed, and
  SIGKILL after `--shutdown-timeout` seconds (30 unless set). When torchrun itself dies, the ranks end here.
* `srun --kill-on-bad-exit=1` (or `KillOnBadExit=1` in slurm.conf) sends SIGTERM to all tasks of the step when one exits with
  an error, and SIGKILL after `KillWait` seconds. Without it, the others wait until the hang is found.

Over gloo, ranks also see the connection of a dead one break; the error that they get is held back until the cause is told.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, NoReturn

from .processes import Alone, Joined
from .rendezvous import PARENT
from .signals import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_LOST, EXIT_REQUEUE

if TYPE_CHECKING:
    from lightning.fabric import Fabric

TICK = 0.5
"""Seconds between looks."""
GRACE = 2.0
"""Seconds that a process has to end by itself, with words of its own, before it is ended for another's death."""
LONG = 10
"""How many times longer than a step a step may take that compiles, or that follows an evaluation, pictures or a checkpoint."""
ANSWER, REPORT = 15.0, 30.0
"""Seconds that rank 0 waits for the others' stacks, and the others for its report."""
FRAMES = 4
HANG_FOLDER, REPORT_NAME = "hang", "report.txt"


class Watch:
    """Watches over this process's relatives from the start of the others, and over its steps while it trains.

    Args:
        fabric: whose launcher starts the other processes of this machine.
    """

    def __init__(self, fabric: Fabric | Joined | Alone) -> None:
        self._fabric, self._children = fabric, {}  # type: ignore[var-annotated]
        self._parent: int | None = None
        self._hang_after: float | None = None
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> None:
        """Around the work of all ranks: an error that another's death may have caused is held back until that is known."""

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._deadline = None
        if kind is not None and issubclass(kind, RuntimeError) and self._fabric.world_size > 1:
            time.sleep(GRACE + 2 * TICK)
        self._ended.set()

    def start(self) -> None:
        """Begin; before the other processes are started, so that none is lost in between."""
        if self._fabric.world_size > 1:
            self._parent = self._fabric.place.parent if isinstance(self._fabric, Joined) else None
            if self._parent is None:
                os.environ[PARENT] = str(os.getpid())
            atexit.register(self._ended.set)
            self._thread.start()

    def expect_steps(self, folder: Path, hang_after: float | None) -> None:
        """From now on steps follow one another.

        Args:
            folder: of the run; stacks are written to `hang/` in it.
            hang_after: seconds that a step may take; `None`: any number.
        """
        self._hang_after, self._folder = hang_after, folder / HANG_FOLDER
        self._earlier = {path: path.stat().st_mtime_ns for path in self._folder.glob("*.txt")}
        self.step(long=True)
        if hang_after is not None and not self._thread.is_alive():
            self._thread.start()

    def step(self, *, long: bool) -> None:
        """A step has ended; the next is `long` when it compiles, or when all ranks or one do other work before it."""
        if self._hang_after is not None:
            self._deadline = time.monotonic() + self._hang_after * (LONG if long else 1)

    def _look(self) -> None:
        while not self._ended.wait(TICK):
            self._adopt()
            if dead := {rank: code for rank, child in self._children.items() if _failed(code := child.poll())}:
                self._end_for(dead)
            if self._parent is not None and os.getppid() != self._parent and not self._ended.wait(GRACE):
                self._end(f"rank {self._fabric.global_rank} ends: the process that started it is gone", EXIT_LOST)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_hanging()

    def _adopt(self) -> None:
        """Take the children out of the launcher's hands: its own observer would kill this process without a word."""
        started: list[Popen[bytes]] = getattr(getattr(self._fabric.strategy, "launcher", None), "procs", [])
        if len(started) == getattr(self._fabric.strategy, "num_processes", 1) - 1:
            self._children |= {self._fabric.global_rank + 1 + index: child for index, child in enumerate(started)}
            started.clear()

    def _end_for(self, dead: dict[int, int]) -> None:
        if min(dead.values()) > 0 and self._ended.wait(GRACE):
            return
        told = " and ".join(f"rank {rank} {_ending(code)}" for rank, code in sorted(dead.items()))
        self._end(f"{told}; the run ends with it", max(*dead.values(), 0) or EXIT_LOST)

    def _end_hanging(self) -> None:
        rank = self._fabric.global_rank
        self._folder.mkdir(exist_ok=True)
        write_stacks(self._file(rank))
        if rank != 0:
            self._wait_for([self._folder / REPORT_NAME], REPORT)
            self._end("", EXIT_HUNG)
        files = [self._file(each) for each in range(self._fabric.world_size)]
        self._wait_for(files, ANSWER)
        lines = [f"rank {each} {_place(path) if self._is_new(path) else 'does not answer'}" for each, path in enumerate(files)]
        lines.insert(0, f"no step for {self._hang_after:g} s; all stacks are in {self._folder}, guard.hang_after=… allows more")
        (self._folder / REPORT_NAME).write_text("".join(f"{line}\n" for line in lines))
        self._end("\ntokar: ".join(lines), EXIT_HUNG)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def _is_new(self, path: Path) -> bool:
        return path.exists() and path.stat().st_mtime_ns != self._earlier.get(path)

    def _wait_for(self, files: list[Path], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(self._is_new(path) for path in files):
            time.sleep(TICK / 5)

    def _end(self, line: str, code: int) -> NoReturn:
        if line:
            sys.stderr.write(f"tokar: {line}\n")
            sys.stderr.flush()
        for child in self._children.values():
            child.kill()
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(code)


def _failed(code: int | None) -> bool:
    """It ended otherwise than a rank does that all ranks end with."""
    return code not in (None, 0, EXIT_REQUEUE, EXIT_INTERRUPTED)


def _ending(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def write_stacks(path: Path) -> None:
    """Write where this process's main thread is, in a line, and then the stacks of all its threads; whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])[: -FRAMES - 1 : -1]
        file.write(
            "is in " + " < ".join(f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in frames) + "\n\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    temporary.replace(path)


def _place(path: Path) -> str:
    return path.read_text().partition("\n")[0]
