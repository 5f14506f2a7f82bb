"""`tokar slurm pipeline`: a chain of jobs, each of which begins when the one before ended well."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..conf.compose import check, compose, is_neutral
from ..conf.slurm import Cluster, Pipeline, Slurm, Step
from ..errors import ConfigError, UserError, nearest
from ..evaluate.console import say
from ..train.folder import tagged_name
from .script import Job, Task
from .submit import STAGES, STATE, hand_in, hints, plan, script_of, split_overrides


@dataclass(frozen=True)
class Link:
    """One job of a chain with its checked tasks."""

    job: Job
    tasks: list[Task]
    folder: Path


def pipeline(overrides: Sequence[str], dry_run: bool) -> int:
    """Check every job of `experiment=…`, then submit them all; returns the exit code."""
    name, rest = _experiment(overrides)
    own, asked = split_overrides(rest)
    composed = compose("slurm", [f"pipeline={name}", *asked])
    config: Slurm = composed.typed
    assert config.pipeline is not None
    links = list(chain(name, config, own, ["slurm", "pipeline", *overrides]))
    if dry_run:
        for link in links:
            say(f"# {link.job.script}\n{script_of(link.job, Path('CODE'))}")
        return 0
    before = ""
    for link in links:
        wait = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        before = hand_in(link.job, link.tasks, *wait)
        say(f"{link.folder}: job {before} is submitted{' after the one before' if wait else ''}")
        for line in hints(link.folder):
            say(line)
    return 0


def _experiment(overrides: Sequence[str]) -> tuple[str, list[str]]:
    found = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    if len(found) != 1:
        raise UserError("which one?", where="experiment", fix="give one: tokar slurm pipeline experiment=digits")
    return found[0], [text for text in overrides if not text.startswith("experiment=")]


def chain(name: str, config: Slurm, overrides: Sequence[str], command: Sequence[str]) -> Iterator[Link]:
    """The jobs of a pipeline, in order, each checked with the folders of those before it.

    Raises:
        UserError: the problems of all tasks of the first job that has some, or an override for a task that there is not.
    """
    assert config.pipeline is not None
    _check_addresses(config.pipeline, overrides)
    places: dict[str, Path] = {}
    tags = _tags(_addressed(overrides, ""))  # of this task and those before it: another tokenizer is another generator
    for step in config.pipeline.steps:
        cluster = _cluster_of(config, step)
        tags += [tag for task in step.tasks for tag in _tags(_addressed(overrides, task)) if tag not in tags]
        folder = _runs(overrides) / tagged_name(f"{name}-{step.name}", tags)
        tasks = []
        for task, text in step.tasks.items():
            stage, *words = _words(step, text, places)
            checked = _plan(stage, words, _addressed(overrides, task), cluster, folder, tagged_name(f"{name}-{task}", tags))
            places[task] = checked.folder
            tasks.append(checked)
        if len(tasks) == 1:
            folder = tasks[0].folder
        job = Job(f"{name}-{step.name}", (folder / STATE).absolute(), tasks, cluster, command)
        yield Link(job, tasks, folder)


def _plan(stage: str, words: list[str], overrides: list[str], cluster: Cluster, folder: Path, name: str) -> Task:
    if stage == "report":
        return Task((stage, *words, str(folder / "report.html")), folder, once=True)
    if stage not in STAGES:
        raise UserError("no such stage", where=f"pipeline: {stage}", fix=nearest(stage, [*STAGES, "report"]))
    return plan(stage, [*words, *overrides], cluster, folder, name)


def _tags(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if not is_neutral(text.lstrip("+~").partition("=")[0])]


def _words(step: Step, text: str, places: Mapping[str, Path]) -> list[str]:
    """A task's words, with the folders of earlier tasks in the place of their names."""

    def place(found: re.Match[str]) -> str:
        if found[1] not in places:
            raise UserError(f"no earlier task {found[1]!r}", where=f"pipeline: {step.name}", fix=nearest(found[1], places))
        return str(places[found[1]])

    return [re.sub(r"(?<!\$)\{(\w+)\}", place, word) for word in shlex.split(text)]


def _cluster_of(config: Slurm, step: Step) -> Cluster:
    if not step.cluster:
        return config.cluster
    plain = {**config.model_dump(), "cluster": {**config.cluster.model_dump(), **step.cluster}}
    try:
        cluster: Cluster = check("slurm", plain).typed.cluster
    except ConfigError as error:
        raise ConfigError([f"pipeline: {step.name}: {line}" for line in error.lines]) from None
    return cluster


def _addressed(overrides: Sequence[str], task: str) -> list[str]:
    """Overrides for every task, and those for this one (`generator:optim.lr=1e-3`)."""
    split = [(found, text) for text in overrides for found in [re.match(r"(\w+):(.*)", text, re.DOTALL)]]
    return [found[2] if found else text for found, text in split if found is None or found[1] == task]


def _check_addresses(pipeline: Pipeline, overrides: Sequence[str]) -> None:
    names = [task for step in pipeline.steps for task in step.tasks]
    for text in overrides:
        found = re.match(r"(\w+):", text)
        if found and found[1] not in names:
            raise UserError(f"no task {found[1]!r}", where=text, fix=nearest(found[1], names))


def _runs(overrides: Sequence[str]) -> Path:
    given = [text for text in overrides if text.startswith("paths.runs=")]
    return Path(compose("evaluate", ["target=.", *given]).typed.paths.runs)
