"""`tokar slurm submit`: check the config, copy the code, write the job's script, hand it to Slurm."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conf.compose import TRAINING, Composed, compose
from ..conf.overrides import quoted
from ..conf.slurm import Cluster, Slurm
from ..errors import UserError, nearest, of_system
from ..evaluate.console import say
from ..evaluate.protocol import write_whole
from ..train.folder import WRITABLE, check_made_with, default_name, run_folder, tagged_name
from .client import sbatch
from .rank import ONCE
from .script import Job, Task, render
from .snapshot import snapshot

STATE, JOBS_NAME, CONFIG_NAME = "slurm", "jobs.jsonl", "config.yaml"
STAGES = (*TRAINING, "encode", "pairs", "sample", "evaluate")
"""What a job can run."""


def submit(stage: str, overrides: Sequence[str], dry_run: bool) -> int:
    """Submit one stage as a job, or print its script; returns the exit code."""
    if stage not in STAGES:
        raise UserError("no such stage", where=stage, fix=nearest(stage, STAGES))
    own, asked = split_overrides(overrides)
    config: Slurm = compose("slurm", asked).typed
    task = plan(stage, own, config.cluster)
    job = Job(
        task.folder.name, (task.folder / STATE).absolute(), [task], config.cluster, ["slurm", "submit", stage, *overrides]
    )
    if dry_run:
        say(script_of(job, Path("CODE")).rstrip("\n"))
        return 0
    number = hand_in(job, [task])
    for line in (f"{task.folder}: job {number} is submitted", *hints(task.folder)):
        say(line)
    return 0


def hints(folder: Path) -> list[str]:
    """The commands to watch and stop a job."""
    run = shlex.quote(str(folder))
    return [f"  watch: tokar slurm logs {run} --follow   (or: tokar slurm status {run})", f"  stop:  tokar slurm stop {run}"]


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the stage, and those of the cluster (`cluster=…`, `cluster.KEY=…`)."""
    asked = [text for text in overrides if re.match(r"[+~]*cluster([.=@]|$)", text)]
    return [text for text in overrides if text not in asked], asked


def plan(stage: str, overrides: Sequence[str], cluster: Cluster, folder: Path | None = None, name: str | None = None) -> Task:
    """Check one task as the job will run it: its ranks are those that the cluster has.

    Args:
        stage: one of `STAGES`.
        overrides: of its config.
        cluster: where it runs.
        folder: of the job, when the task makes none of its own; `None`: below `paths.runs`, named by the overrides.
        name: of the run folder when the overrides give none; `None`: as `tokar train` would name it.

    Raises:
        UserError: a problem of the config, or a run folder that another config made.
    """
    if stage not in ONCE:
        _check_ranks(overrides, cluster)
    composed = compose(stage, overrides)
    once = stage in ONCE or (stage == "evaluate" and not composed.typed.dealt)
    words = [*overrides, *([] if once else _ranks(composed, cluster))]
    if stage in ("sample", "evaluate"):
        folder = folder or Path(composed.typed.paths.runs) / tagged_name(stage, composed.overrides)
        return Task((stage, *words), folder, compose(stage, words), once)
    if stage not in TRAINING:
        return Task((stage, *words), Path(composed.typed.out), compose(stage, words))
    words.append(quoted("name", composed.typed.name or name or default_name(composed)))  # the ranks do not name the folder
    composed = compose(stage, words)
    check_made_with(run_folder(composed), composed)
    return Task((stage, *words), run_folder(composed), composed)


def _check_ranks(overrides: Sequence[str], cluster: Cluster) -> None:
    """Refuse overrides that ask for another number of ranks than the cluster."""
    wanted = {"strategy.nodes": ("cluster.nodes", cluster.nodes), "strategy.devices": ("cluster.tasks_per_node", cluster.tasks)}
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key in wanted and value != str(wanted[key][1]):
            ours, count = wanted[key]
            raise UserError(f"is {value}, but {ours} makes it {count}", where=key, fix=f"leave it out, or set {ours}={value}")


def _ranks(composed: Composed, cluster: Cluster) -> list[str]:
    """The overrides that give a config the cluster's ranks."""
    ranks = [f"strategy.nodes={cluster.nodes}", f"strategy.devices={cluster.tasks}"]
    named = {text.lstrip("+~").partition("=")[0] for text in composed.overrides}
    if composed.typed.strategy.name != "single" or "strategy" in named:
        return ranks
    return ["strategy=ddp", *ranks] if cluster.nodes * cluster.tasks > 1 else []


def script_of(job: Job, code: Path) -> str:
    """The script of a job that runs from here."""
    return render(job, code, Path.cwd())


def hand_in(job: Job, tasks: Sequence[Task], *options: str) -> str:
    """Write everything a job needs below its folder and submit it; returns the job id.

    Raises:
        UserError: the folder cannot be written, or Slurm refuses.
    """
    try:
        job.state.mkdir(parents=True, exist_ok=True)
        job.script.write_text(script_of(job, snapshot(job.state / "code")))
        for task in tasks:
            if task.composed is not None:
                name = CONFIG_NAME if len(tasks) == 1 else f"{task.words[0]}-{task.folder.name}.yaml"
                write_whole(job.state / name, task.composed.yaml().encode())
        start_afresh(job.state)
    except OSError as error:
        raise of_system(error, job.state, fix=WRITABLE) from error
    number = sbatch(job.script, *options)
    record(job.state, number)
    return number


def start_afresh(state: Path) -> None:
    """Forget earlier crashes and the wish to stop: a person has submitted the job again."""
    for name in ("crashes", "stop"):
        (state / name).unlink(missing_ok=True)


def record(state: Path, number: str) -> None:
    """Write down a job id, for `tokar slurm status`."""
    entry: Mapping[str, Any] = {"job": number, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with (state / JOBS_NAME).open("a") as file:
        file.write(json.dumps(entry) + "\n")
