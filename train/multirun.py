"""Many runs from one command: Hydra's sweeper makes the points, each is the run that the same overrides would make alone.

Every point is a process of its own, so that it may start ranks, fail or be killed without touching the others.
"""

from __future__ import annotations

import functools
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException

from ..conf.compose import compose, root_config
from ..conf.overrides import ROOT, for_hydra, is_hydras, parse_override
from ..conf.space import beside_the_first, compose_all, split_space
from ..errors import UserError
from .folder import run_folder
from .signals import EXIT_INTERRUPTED, EXIT_REQUEUE


class PointFailedError(Exception):
    """A point of a sweep ended with an exit code that is not 0; launchers and sweepers see a failed job."""


def multirun(stage: str, overrides: Sequence[str], objective: str | None = None) -> int:
    """Run every point of a sweep; returns 0, or 1 when a point failed (the others ran all the same).

    Args:
        stage: of `tokar train`.
        overrides: with several values (`optim.lr=1e-3,3e-4`), and keys of Hydra (`hydra/launcher=…`, `hydra/sweeper=…`).
        objective: metric of `metrics.jsonl` whose last value a sweeper such as Optuna's gets.

    Raises:
        ConfigError: the problems of all points, before any of them starts.
        SystemExit: a signal stopped a point; the sweep ends with its exit code, and the same command goes on.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT), version_base=None):
        loader = GlobalHydra.instance().config_loader()
        parsed = [parse_override(text, loader) for text in overrides]
        own = [text for text, override in zip(overrides, parsed, strict=True) if not is_hydras(override.key_or_group)]
        words = [for_hydra(override, loader) for override in parsed]
    runs = _check_points(stage, own)
    arguments = [*_hydra_settings(runs, {override.key_or_group for override in parsed}), *words]
    with initialize_config_dir(config_dir=str(ROOT), version_base=None):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        try:
            hydra.multirun(root_config(stage), functools.partial(_point, stage, objective), arguments)
        except PointFailedError as error:
            sys.stderr.write(f"tokar: {error}\n")
            return 1
        except HydraException as error:
            line = " ".join(str(error).split())
            raise UserError(line, where="--multirun", fix="correct the keys of hydra/launcher and hydra/sweeper") from error
    return 0


def _check_points(stage: str, overrides: Sequence[str]) -> Path:
    """Check each value of each swept key beside the first values of the others; returns the folder of runs."""
    fixed, dimensions = split_space(overrides)
    composed = compose_all(stage, ([*fixed, *point] for point in beside_the_first(dimensions)))
    return Path(composed[0].typed.paths.runs)


def _hydra_settings(runs: Path, given: set[str]) -> list[str]:
    """Where Hydra keeps its own files; a random part keeps apart two sweeps of the same second."""
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(3)}"
    settings = {
        "hydra.sweep.dir": f"'{runs / '.multirun' / name}'",
        "hydra.sweep.subdir": "'${hydra.job.num}'",
        "hydra.output_subdir": "null",
        "hydra.job.chdir": "false",
        "hydra/job_logging": "none",
    }
    if "hydra/launcher" not in given:
        settings["hydra/hydra_logging"] = "none"  # each point says its own command
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def _point(stage: str, objective: str | None, _: Any) -> float | None:
    """Run one point as `tokar train` in a process of its own; what Hydra calls a job.

    Raises:
        PointFailedError: it ended with another exit code than 0.
    """
    overrides = [text.lstrip("+") for text in HydraConfig.get().overrides.task]
    sys.stderr.write(f"tokar train {stage} {' '.join(overrides)}\n")
    process = subprocess.Popen(command(stage, overrides), process_group=0)
    with _passing_on_signals(process):
        code = process.wait()
    if code in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        raise SystemExit(code)
    if code:
        raise PointFailedError(f"a point of the sweep ended with exit code {code}; see above, and run it alone to look closer")
    return _objective(run_folder(compose(stage, overrides)), objective) if objective else None


def command(stage: str, overrides: Sequence[str]) -> list[str]:
    """The command of one point."""
    return [sys.executable, "-m", "tokar.cli", "train", stage, *overrides]


@contextmanager
def _passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that ask this process to stop go to the point, which is in a process group of its own and saves first."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _objective(folder: Path, name: str) -> float:
    """Last value of a metric of a finished run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [line[name] for line in lines if name in line]
    if not values:
        known = sorted({key for line in lines if "event" not in line for key in line} - {"step", "samples"})
        raise UserError(f"no metric {name!r}", where=folder / "metrics.jsonl", fix=f"choose one of: {', '.join(known)}")
    return float(values[-1])
