"""`tokar sweep STAGE …`: check everything, write the folder, start what is missing. The same command again goes on."""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..conf.compose import TRAINING, Composed, compose, is_neutral
from ..conf.duration import Duration
from ..conf.schema import SCHEMAS
from ..conf.slurm import Cluster
from ..conf.space import beside_the_first, compose_all, split_space
from ..conf.sweeps import Sweep as Settings
from ..conf.sweeps import SweepCommand
from ..data.files import alone_in, check_place
from ..errors import ConfigError, UserError, nearest
from ..evaluate.console import say
from ..slurm.client import call
from ..slurm.submit import plan as plan_ranks
from .array import submit
from .folder import FAILED, PLAN_NAME, Plan, SweepFolder
from .points import add_points, check_points, planned
from .study import import_optuna
from .values import direction_of
from .worker import Worker, failure_words, summary

FOLDER = "sweeps"
"""Below `paths.runs`."""
IDENTITY = ("method", "seed")
"""Settings that the points of a folder depend on."""
TPE_IDENTITY = (*IDENTITY, "metric", "value")


def sweep(stage: str, overrides: Sequence[str]) -> int:
    """Start a sweep, or what is missing of it; returns the exit code (0 done or submitted, 1 points failed, 75, 130).

    Args:
        stage: of `tokar train`.
        overrides: of its config, some with several values, and of the sweep's own (`sweep=…`, `sweep.…=…`).

    Raises:
        ConfigError: every problem of the sweep and of all points, before the first starts.
    """
    if stage not in TRAINING:
        raise UserError("no stage to sweep", where=stage, fix=nearest(stage, (*TRAINING, "status", "best", "report")))
    own, rest = _part(stage, overrides)
    settings, cluster = _settings(own, stage, rest)
    fixed, dimensions = split_space(rest)
    if not dimensions:
        raise UserError("nothing varies", where=f"sweep {stage}", fix="give a key several values, e.g. optim.lr=1e-3,3e-4")
    space = [text for text in rest if text not in fixed]
    plan = Plan(stage, tuple(fixed), tuple(space), settings, str(settings.direction), cluster)
    values = planned(plan, dimensions)
    composed = check_points(plan, dimensions, values)
    _check_pair(settings, composed[0])
    if cluster is not None:
        plan_ranks(stage, [*fixed, *beside_the_first(dimensions)[0]], cluster)  # its ranks must fit the strategy
    path = Path(composed[0].typed.paths.runs) / FOLDER / (settings.name or _default_name(composed[0], plan))
    folder = _open(path, plan)
    if values:
        with alone_in(folder.path / "points", patience=60):
            add_points(folder, values, composed)
    return _start(folder)


def _part(stage: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the sweep itself, misspelt ones too, and those of the stage."""
    own_names, stage_names = set(SweepCommand.model_fields) - {"stage"}, set(SCHEMAS[stage].model_fields)
    own: list[str] = []
    rest: list[str] = []
    for text in overrides:
        head = re.split(r"[./=@]", text.lstrip("+~"))[0]
        close = [] if head in stage_names else difflib.get_close_matches(head, [*own_names, *stage_names], 1)
        (own if own_names & {head, *close} else rest).append(text)
    return own, rest


def _settings(own: Sequence[str], stage: str, rest: Sequence[str]) -> tuple[Settings, Cluster | None]:
    """The sweep's own settings, with the direction filled in, and what its jobs ask for.

    Raises:
        ConfigError: their problems, those of the stage's fixed overrides among them.
    """
    problems: list[str] = []
    try:
        command: SweepCommand = compose("sweep", own).typed
    except ConfigError as error:
        problems += error.lines
        try:  # all at once
            fixed, dimensions = split_space(rest)
            compose_all(stage, ([*fixed, *point] for point in beside_the_first(dimensions)))
        except ConfigError as other:
            problems += other.lines
        raise ConfigError(problems) from error
    settings = command.sweep
    direction = settings.direction or direction_of(settings.metric)
    if direction is None:
        problems.append(f"sweep.direction: missing; the name {settings.metric!r} does not say it, set minimize or maximize")
    if settings.method != "grid" and settings.count is None:
        problems.append("sweep.count: missing; say how many points")
    if settings.method == "grid" and settings.count is not None:
        problems.append("sweep.count: a grid has as many points as its values make; leave it out, or take sweep=random")
    if settings.pruning is not None and settings.method != "tpe":
        problems.append(f"sweep.pruning: {settings.method} does not prune; take sweep=tpe, or leave it out")
    if settings.backend == "slurm" and command.cluster is None:
        problems.append("cluster: missing; say what the job of each point asks for, e.g. cluster=gpu")
    if settings.backend == "local" and command.cluster is not None:
        problems.append("cluster: points run here; set sweep.backend=slurm, or leave it out")
    if problems:
        raise ConfigError(problems)
    if settings.method == "tpe":
        import_optuna()
    if settings.backend == "slurm":
        call("sbatch", "--version")
    return settings.model_copy(update={"direction": direction}), command.cluster


def _check_pair(settings: Settings, composed: Composed) -> None:
    """Pruning needs values before the end.

    Raises:
        ConfigError: there are none.
    """
    loop = composed.typed.loop
    if settings.pruning is not None and settings.metric.startswith("val/") and loop.eval_every is None:
        fix = f"set loop.eval_every (of {Duration.parse(loop.duration)}), or leave out sweep/pruning"
        raise ConfigError([f"sweep.pruning: {settings.metric} is measured only at the end of a run; {fix}"])


def _default_name(composed: Composed, plan: Plan) -> str:
    """E.g. `digits_classifier-optim.lr=1e-3,3e-4-seed=0,1`; a long one ends in a hash."""
    base = composed.typed.experiment or plan.stage
    tags = [text for text in (*plan.fixed, *plan.space) if not is_neutral(re.split(r"[=@]", text.lstrip("+~"))[0])]
    tags = sorted(tag for tag in tags if not tag.startswith("experiment="))
    method = [] if plan.settings.method == "grid" else [plan.settings.method]
    name = "-".join([base, *method, *(re.sub(r"[^\w.=,+~-]+", "_", tag).strip("_") for tag in tags)])
    return name if len(name) <= 100 else f"{base}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _open(path: Path, plan: Plan) -> SweepFolder:
    """The folder of a sweep, new or of an earlier start, whose points must fit."""
    check_place(path)
    if (path / PLAN_NAME).exists():
        _check_same(path, SweepFolder(path).plan, plan)
    return SweepFolder.create(path, plan)


def _check_same(path: Path, old: Plan, new: Plan) -> None:
    keys = TPE_IDENTITY if new.settings.method == "tpe" else IDENTITY
    pairs = [("stage", old.stage, new.stage), ("overrides", sorted(old.fixed + old.space), sorted(new.fixed + new.space))]
    pairs += [(f"sweep.{key}", getattr(old.settings, key), getattr(new.settings, key)) for key in keys]
    pairs += [("sweep.direction", old.direction, new.direction)] if new.settings.method == "tpe" else []
    changed = [f"{name}: {before!r} → {after!r}" for name, before, after in pairs if before != after]
    if changed:
        raise UserError(f"this sweep was made with other settings: {', '.join(changed)}", where=path,
                        fix="set sweep.name=… for a new sweep, or undo the change")  # fmt: skip


def _start(folder: SweepFolder) -> int:
    """Say what failed for good before, then run or submit what is missing."""
    for point in folder.points():
        if point.state == FAILED and not folder.may_start(point):
            sys.stderr.write(failure_words(folder, point) + "\n")
    say(summary(folder))
    if folder.plan.settings.backend == "slurm":
        return submit(folder)
    code = Worker(folder, slots=folder.plan.settings.parallel).run()
    say(summary(folder))
    say(f"see it with `tokar sweep status {folder.path}`, `best` and `report`")
    return code
