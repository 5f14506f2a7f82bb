"""The one order of events of a training run.

1 compose and check the config · 2 start the workers · 3 open the data · 4 build the stage (on every rank from one seed) ·
5 claim the run folder and write the snapshot · 6 restore: own newest checkpoint → `resume_from` → `init_from` → fresh ·
7 fit · 8 report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..conf.compose import Composed, compose
from ..conf.duration import Duration
from ..data.files import digest_of
from ..errors import EXIT_USER_ERROR
from . import checkpoint, store
from .checkpoint import Checkpoints
from .clock import Clock
from .drawn import save_plan
from .folder import RunFolder, run_folder
from .guard import Diverged, Guard
from .logging import METRICS_NAME, TIMING_NAME, Meters, MetricsFile, Progress, Wandb
from .loop import Fit
from .network import Network
from .profiler import Windows
from .signals import StopFlag, Stopped
from .stages import BUILDERS, Built
from .strategy import Workers
from .telemetry import Telemetry


def train(stage: str, overrides: Sequence[str]) -> int:
    """Run a training stage; returns the exit code (0 done, 75 stopped by a signal after saving, 130 by Ctrl-C)."""
    return start(compose(stage, overrides))


def start(composed: Composed, stop: StopFlag | None = None) -> int:
    """Run a training stage whose config is checked; returns the exit code.

    Args:
        composed: its config.
        stop: the flag of a caller that took over the signals before the imports; `None`: they are taken over here.
    """
    workers = Workers(composed.typed.strategy)
    workers.launch()
    if stop is None:
        stop = StopFlag()
        stop.install()
    with workers.watch:
        workers.check_agreement(digest_of(composed.plain))
        return run(composed, workers, stop)


def run(composed: Composed, workers: Workers, stop: StopFlag) -> int:
    """Steps 3 to 8."""
    config = composed.typed
    torch.manual_seed(config.seed)
    built = BUILDERS[config.stage](config, workers)
    path = run_folder(composed)
    folder = RunFolder(path, composed) if workers.rank == 0 else None
    if folder is not None:
        main = next(iter(built.stage.trainables.values()))
        save_plan(main.module, main.facts or {}, path)
    workers.barrier()
    telemetry = Telemetry(built.stage, workers, Windows(config.profile, path, workers.rank, workers.device))
    for module in built.stage.frozen:
        module.to(workers.device)
    networks = workers.wrap(built.stage.trainables, config.ema)
    fit = _fit(composed, built, workers, networks, telemetry, path, stop)
    if fit.clock.finished:
        fit.progress.say(f"{path}: already finished at step {fit.clock.step}")
        return 0
    try:
        fit.fit()
    except Stopped as stopped:
        fit.progress.say(f"{path}: {stopped}")
        return stopped.exit_code
    except Diverged:
        if folder is not None:
            raise
        return EXIT_USER_ERROR  # said by rank 0
    finally:
        fit.progress.close()
        fit.wandb.finish()
    if folder is not None:
        fit.progress.say(f"{path}: done, {fit.clock.step} steps; see it with `tokar report {path}`")
    return 0


def _fit(
    composed: Composed,
    built: Built,
    workers: Workers,
    networks: dict[str, Network],
    telemetry: Telemetry,
    path: Path,
    stop: StopFlag,
) -> Fit:
    config = composed.typed
    size = len(built.train.dataset)
    batch = config.loop.batch_size
    clock = Clock(0, 0, Duration.parse(config.loop.duration).steps(batch, size), batch, size)
    meters = Meters()
    guard = Guard(config.guard, networks, workers)
    checkpoints = _checkpoints(config, path, workers, clock)
    saved = _restore_point(config, checkpoints, workers)
    if saved is not None:
        meters.sums = checkpoint.restore(saved, networks, workers)
        clock = Clock(saved.step, saved.state["samples"], clock.total, batch, size)
        guard.restore(saved.state.get("guard"))
    elif config.init_from:
        _initialise(Path(config.init_from), networks)
    main = workers.rank == 0
    progress = Progress(path.name, clock, enabled=main and config.logger.progress)
    if saved is not None:
        progress.say(f"{path}: going on from {saved.path} at step {saved.step}")
    logs = path if main else path / f".rank-{workers.rank}"
    logs.mkdir(parents=True, exist_ok=True)
    return Fit(
        stage=built.stage, workers=workers, networks=networks, train=built.train, validate=built.validate, clock=clock,
        loop=config.loop, schedule=config.schedule, seed=config.seed, folder=path,
        checkpoints=checkpoints, facts={"config": composed.plain},
        metrics=MetricsFile(logs / METRICS_NAME, clock.samples), timing=MetricsFile(logs / TIMING_NAME, clock.samples),
        wandb=Wandb(config.logger.wandb, path, path.name, composed.plain) if main else Wandb.silent(),
        progress=progress, telemetry=telemetry, stop=stop, guard=guard, meters=meters,
    )  # fmt: skip


def _checkpoints(config: Any, path: Path, workers: Workers, clock: Clock) -> Checkpoints:
    loop = config.loop

    def kept(step: int) -> bool:
        return loop.keep_every is not None and step % max(1, clock.steps(loop.keep_every)) == 0

    return Checkpoints(path / "checkpoints", workers, loop.keep, kept, loop.save_async)


def _restore_point(config: Any, checkpoints: Checkpoints, workers: Workers) -> store.Saved | None:
    if workers.rank == 0:
        store.sweep_unfinished(checkpoints.folder)
    workers.barrier()
    saved = checkpoints.newest(workers.warn)
    if saved is None and config.resume_from:
        saved = checkpoints.find(Path(config.resume_from), workers.warn)
    return saved


def _initialise(path: Path, networks: dict[str, Network]) -> None:
    """Weights of the main network from a run, a checkpoint or an exported model."""
    from ..models.build import load_model, locate_model, shapes_of
    from ..models.generators.base import Generator

    network = next(iter(networks.values()))
    model = load_model(locate_model(path), trusted=True)
    own = network.module
    weights = own.weights_from(model) if isinstance(own, Generator) else model.state_dict()
    checkpoint.load_weights(
        network,
        shapes_of(weights),
        lambda name, start, count: weights[name].reshape(-1)[start : start + count],
        where=path,
        family=type(model).__name__,
    )
    if network.ema is not None:
        network.ema.restart()
