"""SLURM arrays: a job for each missing point takes it, runs it and writes what became of it. Nothing must stay alive."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..evaluate.console import say
from ..evaluate.protocol import write_whole
from ..slurm.client import call, sbatch
from ..slurm.script import Job, Task, fill, values_of
from ..slurm.snapshot import snapshot
from ..slurm.submit import plan as plan_ranks
from ..train.hosts import FIRST_PORT, PORTS
from .folder import RUNNING, SweepFolder
from .points import total
from .processes import Launched, Process
from .worker import Worker

SCRIPT_NAME, CODE = "array.sbatch", "code"


def submit(sweep: SweepFolder) -> int:
    """Submit an array for the points that are missing and not in the queue already; returns the exit code.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    tasks = missing(sweep, _queued(sweep))
    if not tasks:
        say("nothing to submit: every point has ended, or is in the queue")
        return 0
    script = sweep.path / SCRIPT_NAME
    write_whole(script, render(sweep, tasks, snapshot(sweep.path.absolute() / CODE)).encode())
    job = sbatch(script)
    say(f"job {job}: {len(tasks)} points, {sweep.plan.settings.parallel} at once; {script}")
    say(f"watch: tokar sweep status {sweep.path}    stop: scancel {job}    go on: the same command")
    return 0


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


def render(sweep: SweepFolder, tasks: Sequence[int], code: Path) -> str:
    """The batch script of an array of these tasks."""
    settings = sweep.plan.settings
    point = "" if settings.method == "tpe" else ' --point "$SLURM_ARRAY_TASK_ID"'
    array = f"{ranges(tasks)}%{settings.parallel}"
    own = {
        "array": array,
        "script": shlex.quote(str(sweep.path.absolute() / SCRIPT_NAME)),
    }
    template = Path(__file__).with_name(SCRIPT_NAME).read_text().replace("{{point}}", point)
    return fill(template, {**_values(sweep, code), **own})


def _values(sweep: SweepFolder, code: Path) -> dict[str, Any]:
    """What the cluster's preset means in a script."""
    assert sweep.plan.cluster is not None
    command = ["sweep", sweep.plan.stage, *sweep.plan.fixed, *sweep.plan.space]
    job = Job(job_name(sweep), sweep.path.absolute(), [Task(("sweep",), sweep.path)], sweep.plan.cluster, command)
    return values_of(job, code, Path.cwd())


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as `--array` takes them: `0-3,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def work(path: Path, number: int | None) -> int:
    """What a job of an array does: run one point, `number` or any that is free, with its retries; returns the exit code.

    Told to stop before its time limit, it saves and comes back.
    """
    sweep = SweepFolder(path)
    if number is not None and sweep.point(number) is None:
        raise UserError(f"no point {number}", where=path, fix=f"choose one of 0 to {len(sweep.points()) - 1}")
    cluster, job = sweep.plan.cluster, os.environ.get("SLURM_JOB_ID")
    alone = cluster is None or job is None or (cluster.nodes * cluster.tasks == 1 and not cluster.container)
    worker = Worker(sweep, only=number, single=True, launch=None if alone else lambda *given: _launch(sweep, *given))
    code = worker.run()
    if worker.stop == signal.SIGUSR1 and job is not None:
        say(f"job {job}: the time limit is near; saved, and back in the queue")
        call("scontrol", "requeue", job)
    if worker.only is None:
        say("no point left to run")
    return code


def _launch(sweep: SweepFolder, overrides: Sequence[str], log: Path, lock: IO[str]) -> Process:
    """Start the ranks of a point as `tokar slurm submit` would."""
    cluster = sweep.plan.cluster
    assert cluster is not None
    words = plan_ranks(sweep.plan.stage, overrides, cluster).words
    start = ["tokar.slurm.node", str(cluster.tasks)] if cluster.launcher == "torchrun" else ["tokar.slurm.rank"]
    options = shlex.split(_values(sweep, sweep.path / CODE)["srun"])
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS))
    return Launched(["srun", *options, sys.executable, "-m", *start, *words], log, lock)


def _queued(sweep: SweepFolder) -> list[int]:
    """Task numbers of this sweep that wait or run."""
    said = call("squeue", "-h", "-r", "-n", job_name(sweep), "-o", "%K")
    return [int(word) for word in said.split() if word.isdigit()]
