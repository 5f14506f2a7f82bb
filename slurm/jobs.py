"""`tokar slurm status | logs | stop | requeue`: what became of a run's job, and how it is stopped and started again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from ..errors import UserError
from ..evaluate.console import say
from .client import call, queued, sbatch
from .submit import JOBS_NAME, STATE, hints, record, start_afresh

ACTIVE = frozenset({"PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})


def state_of(run: Path) -> Path:
    """Where the job of a run keeps its things.

    Raises:
        UserError: no job was submitted for it.
    """
    state = run / STATE
    if not (state / "job.sbatch").is_file():
        raise UserError("no job was submitted for this folder", where=run, fix="submit one: tokar slurm submit STAGE …")
    return state


def job_of(run: Path) -> str:
    """The job submitted last.

    Raises:
        UserError: there is none.
    """
    entries = submissions(state_of(run))
    if not entries:
        raise UserError("its job was written but not submitted", where=run, fix=f"sbatch {run / STATE / 'job.sbatch'}")
    return entries[-1]


def submissions(state: Path) -> list[str]:
    """Ids of the jobs of a run, in the order of submission; a job that was submitted by hand is known by its log."""
    file = state / JOBS_NAME
    known = [str(json.loads(line)["job"]) for line in file.read_text().splitlines()] if file.exists() else []
    logs = sorted(state.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return [*known, *(log.stem for log in logs if log.stem not in known and log.stem.isdigit())]


def status(runs: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """Rows of a table: run, job, state and why, starts, steps, crashes."""
    jobs = {run: job_of(run) for run in runs}
    known = queued(list(jobs.values()))
    yield ("run", "job", "state", "starts", "step", "crashes")
    for run, job in jobs.items():
        found = known.get(job, {})
        state = found.get("state", "ENDED (Slurm has forgotten it)")
        reason = found.get("reason", "None")
        shown = state if reason in ("None", "(null)") else f"{state} ({reason})"
        starts = str(int(found.get("restarts") or 0) + 1) if found else "?"
        yield (str(run), job, shown, starts, progress(run), crashes(run / STATE))


def progress(run: Path) -> str:
    """Newest checkpoint of a training run and its length, e.g. `1000 of 2000`; empty for other jobs."""
    config = run / STATE / "config.yaml"
    loop = (yaml.safe_load(config.read_text()) or {}).get("loop") if config.is_file() else None
    if loop is None:
        return ""
    steps = [int(marker.parent.name.removeprefix("step-")) for marker in run.glob("checkpoints/step-*/COMPLETE")]
    return f"{max(steps, default=0)} saved, of {loop['duration']}"


def crashes(state: Path) -> str:
    """How many have been counted since the submission."""
    return (state / "crashes").read_text().strip() if (state / "crashes").is_file() else "0"


def logs(run: Path, lines: int, follow: bool) -> int:
    """Show the end of the newest log; returns the exit code."""
    job = job_of(run)
    file = run / STATE / f"{job}.log"
    if not file.is_file():
        raise UserError("there is no log yet", where=file, fix=f"the job has not begun; see tokar slurm status {run}")
    if follow:
        os.execvp("tail", ["tail", "-n", str(lines), "-F", str(file)])
    say("\n".join(file.read_text(errors="replace").splitlines()[-lines:]))
    return 0


def stop(run: Path, now: bool) -> int:
    """Let a job save and end, or end it at once; it is not requeued. Returns the exit code."""
    job = job_of(run)
    state = queued([job]).get(job, {}).get("state", "")
    if state not in ACTIVE:
        raise UserError(f"its job {job} is not running", where=run, fix=f"see tokar slurm status {run}")
    (run / STATE / "stop").touch()
    if state == "RUNNING" and not now:
        call("scancel", "--signal=USR1", job)
        say(f"{run}: job {job} saves and ends; go on with: tokar slurm requeue {run}")
    else:
        call("scancel", job)
        say(f"{run}: job {job} is cancelled; go on with: tokar slurm requeue {run}")
    return 0


def requeue(run: Path, now: bool) -> int:
    """Start a job again: one that runs saves before, one that ended is submitted anew. Returns the exit code."""
    job, state = job_of(run), state_of(run)
    found = queued([job]).get(job, {}).get("state", "")
    if found == "PENDING":
        raise UserError(f"its job {job} is waiting already", where=run, fix=f"see tokar slurm status {run}")
    start_afresh(state)
    if found == "RUNNING":
        call(*(("scontrol", "requeue", job) if now else ("scancel", "--signal=USR1", job)))
        say(f"{run}: job {job} saves and starts again")
        return 0
    number = sbatch(state / "job.sbatch")
    record(state, number)
    for line in (f"{run}: job {number} is submitted", *hints(run)):
        say(line)
    return 0
