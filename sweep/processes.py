"""The process of a point: forked from one that has imported everything once, or started by srun where it has ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn, Protocol

from ..errors import UserError
from ..slurm.rank import ENDED
from ..train.signals import EXIT_INTERRUPTED

PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent dies."""

JOB = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
"""What says in which job this process runs."""


class Process(Protocol):
    """What a worker needs of a running point."""

    def poll(self) -> int | None:
        """The exit code, minus the signal for one that was killed; `None` while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal to it, unless it has ended."""


class Forked:
    """A child of this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal for one that was killed; `None` while it runs."""
        if self._code is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def send_signal(self, number: int, /) -> None:
        """Send a signal to it, unless it has ended."""
        if self.poll() is None:
            os.kill(self._pid, number)


def fork(stage: str, overrides: Sequence[str], log: Path, environment: dict[str, str], others: Sequence[IO[str]]) -> Process:
    """Run `tokar train` in a child that shares the imports of this process.

    Args:
        stage: to train.
        overrides: of its config.
        log: gets what it prints, behind what is there.
        environment: variables to set.
        others: locks that this process holds and the child must not keep alive.
    """
    from ..train.run import train  # before the fork: the seconds of these imports are paid once

    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Forked(pid)
    try:
        for lock in others:
            lock.close()
        _settle(parent, log, environment)
        sys.argv[1:] = ["train", stage, *overrides]  # what ranks are started with
        _leave(lambda: train(stage, overrides))
    finally:
        os._exit(1)  # whatever happens, the child must not go on as if it were the worker


def _settle(parent: int, log: Path, environment: dict[str, str]) -> None:
    """Own process group, default signals, output to the log; SIGTERM, which saves, when the parent dies."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    for descriptor, file, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(file, flags, 0o666), descriptor)
    os.dup2(1, 2)
    for name in [name for name in os.environ if name.startswith("SLURM_") and name not in JOB]:
        del os.environ[name]  # of the worker's own job step: a point that was not started by srun is no rank of it
    os.environ.update(environment)


def _leave(run: Callable[[], int]) -> NoReturn:
    """Run and leave with the exit code and the words of the command line."""
    code = 1
    try:
        code = run()
    except UserError as error:
        code = 2
        sys.stderr.write("".join(f"tokar: {line}\n" for line in error.lines))
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Launched:
    """Ranks that srun started. They end with 0 when they saved after a signal; how they really ended is in a file."""

    def __init__(self, command: Sequence[str], log: Path, lock: IO[str]) -> None:
        self._ended = log.with_suffix(".ended").absolute()
        self._ended.unlink(missing_ok=True)
        with log.open("a") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
                pass_fds=[lock.fileno()], env=os.environ | {ENDED: str(self._ended)},
            )  # fmt: skip

    def poll(self) -> int | None:
        """The exit code of the first rank that ended otherwise than well, else srun's; `None` while they run."""
        code = self._process.poll()
        if code is not None and self._ended.is_file() and (said := self._ended.read_text().strip()):
            return int(said)
        return code

    def send_signal(self, number: int, /) -> None:
        """Ask the ranks to save and end; srun hands SIGUSR1 on to them, and would end itself by the others."""
        self._process.send_signal(signal.SIGUSR1)


def visible_gpus() -> list[str]:
    """GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them; needs no CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def share_of_gpus(slot: int, devices: int) -> dict[str, str]:
    """The variable that gives a slot its own GPUs, round and round; empty where there are none."""
    gpus = visible_gpus()
    chosen = [gpus[(slot * devices + place) % len(gpus)] for place in range(min(devices, len(gpus)))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if chosen else {}
