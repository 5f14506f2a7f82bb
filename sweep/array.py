"""SLURM arrays: a job for each missing point takes it, runs it and writes what became of it. Nothing must stay alive."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ..conf.compose import compose
from ..conf.space import beside_the_first, split_space
from ..conf.spine import Strategy
from ..errors import UserError
from ..evaluate.console import say
from ..evaluate.protocol import write_whole
from .folder import RUNNING, SweepFolder
from .points import total
from .worker import Worker

SCRIPT_NAME = "array.sbatch"
SIGNAL_BEFORE = 120
"""Seconds before the time limit at which a job is told to save and to come back."""


def submit(sweep: SweepFolder) -> int:
    """Submit an array for the points that are missing and not in the queue already; returns the exit code.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    check_slurm()
    tasks = missing(sweep, _queued(sweep))
    if not tasks:
        say("nothing to submit: every point has ended, or is in the queue")
        return 0
    script = sweep.path / SCRIPT_NAME
    write_whole(script, render(sweep, tasks).encode())
    job = _slurm(["sbatch", "--parsable", str(script)]).partition(";")[0]
    say(f"job {job}: {len(tasks)} points, {sweep.plan.settings.parallel} at once; {script}")
    say(f"watch: tokar sweep status {sweep.path}    stop: scancel {job}    go on: the same command")
    return 0


def check_slurm() -> None:
    """Make sure that jobs can be submitted from here.

    Raises:
        UserError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here", where="sweep.backend=slurm", fix="run it on a login node, or set sweep.backend=local")


def missing(sweep: SweepFolder, queued: Sequence[int]) -> list[int]:
    """Task numbers to submit: of points that may start and that nobody runs nor waits for; with Optuna any numbers do."""
    points = sweep.points()
    if sweep.plan.settings.method == "tpe":
        done = sum(not sweep.may_start(point) for point in points)
        busy = max(len(queued), sum(point.state == RUNNING for point in points))
        return list(range(int(total(sweep.plan, len(points))) - done - busy))
    startable = (point.number for point in points if sweep.may_start(point) and point.state != RUNNING)
    return [number for number in startable if number not in queued]


def job_name(sweep: SweepFolder) -> str:
    """The same for every submission of a sweep, and for no other sweep: Slurm is asked by it what waits already."""
    digest = hashlib.sha256(str(sweep.path.resolve()).encode()).hexdigest()[:8]
    return f"sweep-{sweep.path.name[:40]}-{digest}"


def render(sweep: SweepFolder, tasks: Sequence[int]) -> str:
    """The batch script of an array of these tasks."""
    path, settings, strategy = sweep.path, sweep.plan.settings, strategy_of(sweep)
    own = [
        f"--job-name={job_name(sweep)}", f"--array={ranges(tasks)}%{settings.parallel}", f"--nodes={strategy.nodes}",
        f"--ntasks-per-node={strategy.devices}", f"--output={path.resolve()}/logs/job-%A_%a.log", "--open-mode=append",
        "--requeue", f"--signal=B:USR1@{SIGNAL_BEFORE}",
    ]  # fmt: skip
    point = "" if settings.method == "tpe" else ' --point "$SLURM_ARRAY_TASK_ID"'
    return files(__package__).joinpath(SCRIPT_NAME).read_text().format(
        title=" ".join(path.name.split()), options="\n".join(f"#SBATCH {option}" for option in [*own, *settings.sbatch]),
        here=shlex.quote(os.getcwd()), python=shlex.quote(sys.executable), folder=shlex.quote(str(path)), point=point,
    )  # fmt: skip


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as `--array` takes them: `0-3,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def strategy_of(sweep: SweepFolder) -> Strategy:
    """How the points are spread: all of them alike."""
    first = beside_the_first(split_space(sweep.plan.space)[1])[0]
    strategy: Strategy = compose(sweep.plan.stage, [*sweep.plan.fixed, *first]).typed.strategy
    return strategy


def work(path: Path, number: int | None) -> int:
    """What a job of an array does: run one point, `number` or any that is free, with its retries; returns the exit code.

    Told to stop before its time limit, it saves and comes back.
    """
    sweep = SweepFolder(path)
    if number is not None and sweep.point(number) is None:
        raise UserError(f"no point {number}", where=path, fix=f"choose one of 0 to {len(sweep.points()) - 1}")
    strategy, job = strategy_of(sweep), os.environ.get("SLURM_JOB_ID")
    ranks = job is not None and strategy.devices * strategy.nodes > 1
    worker = Worker(sweep, only=number, single=True, launcher=["srun", "--kill-on-bad-exit=1"] if ranks else [])
    code = worker.run()
    if worker.stop == signal.SIGUSR1 and job is not None:
        say(f"job {job}: the time limit is near; saved, and back in the queue")
        _slurm(["scontrol", "requeue", job])
    if worker.only is None:
        say("no point left to run")
    return code


def _queued(sweep: SweepFolder) -> list[int]:
    """Task numbers of this sweep that wait or run."""
    said = _slurm(["squeue", "-h", "-r", "-n", job_name(sweep), "-o", "%K"])
    return [int(word) for word in said.split() if word.isdigit()]


def _slurm(command: Sequence[str]) -> str:
    """What a command of Slurm prints.

    Raises:
        UserError: Slurm refuses, in its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"no answer from Slurm: {error}", where=command[0], fix="try again, or set sweep.backend=local"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix(f"{command[0]}: error: ")
        raise UserError(f"Slurm refuses: {said}", where=command[0], fix="correct sweep.sbatch=[…]")
    return done.stdout.strip()
