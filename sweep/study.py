"""Optuna asks and is told: a study in sqlite beside the points, which many processes share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..conf.space import Dimension
from ..conf.sweeps import Pruning
from ..data.files import alone_in
from ..errors import UserError
from .folder import Plan

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STUDY_NAME = "study.db"
PATIENCE = 120.0
"""Seconds for the others of a sweep to finish what they write."""


class Study:
    """The study of a sweep. Every call opens the storage under the folder's lock, so that no two write at once.

    Args:
        folder: of the sweep.
        plan: what was asked for.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        import_optuna()
        self._folder, self._plan = folder / "study", plan
        self._folder.mkdir(exist_ok=True)

    def ask(self, dimensions: Sequence[Dimension], number: int, recorded: Sequence[int]) -> tuple[int, tuple[str, ...]]:
        """The trial of a new point and its overrides.

        Args:
            dimensions: of the space.
            number: of the point; the sampler's seed depends on it, so that no two processes draw alike.
            recorded: trials that points have. Others that look alive are of processes that died before they wrote a point.
        """
        with alone_in(self._folder, PATIENCE):
            study = self._open(self._plan.settings.seed + 1_000_003 * number)
            _give_up_orphans(study, recorded)
            trial = study.ask({each.key: distribution(each) for each in dimensions})
            return trial.number, tuple(each.override(trial.params[each.key]) for each in dimensions)

    def report(self, number: int, values: Sequence[tuple[int, float]]) -> bool:
        """Store the values of a running trial, each with its step; true as soon as one says that it should stop."""
        with alone_in(self._folder, PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that an interrupted process had stored already
            study = self._open(0)
            trial = _living(study, number)
            if trial is None:
                return False
            waits = _completed(study) < (self._plan.settings.pruning or Pruning()).trials
            for step, value in values:
                trial.report(value, step)
                if not waits and trial.should_prune():
                    return True
            return False

    def tell(self, number: int, value: float | None, *, pruned: bool = False) -> None:
        """End a trial with its value, as pruned, or, without a value, as failed. One that has ended stays as it is."""
        import optuna

        state = optuna.trial.TrialState
        ended = state.PRUNED if pruned else state.COMPLETE if value is not None and math.isfinite(value) else state.FAIL
        with alone_in(self._folder, PATIENCE):
            values = value if ended == state.COMPLETE else None
            self._open(0).tell(number, values, state=ended, skip_if_finished=True)

    def _open(self, seed: int) -> optuna.Study:
        import optuna
        from sqlalchemy.pool import NullPool

        # no connection outlives a call: processes are forked between calls
        storage = optuna.storages.RDBStorage(f"sqlite:///{self._folder / STUDY_NAME}", {"poolclass": NullPool})
        settings = self._plan.settings
        return optuna.create_study(
            storage=storage, study_name="sweep", load_if_exists=True, direction=self._plan.direction,  # type: ignore[arg-type]
            sampler=optuna.samplers.TPESampler(seed=seed % 2**32), pruner=pruner(settings.pruning),
        )  # fmt: skip


def import_optuna() -> None:
    """Make sure that Optuna is there, and quiet.

    Raises:
        UserError: it is not.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("Optuna is not installed", where="sweep.method=tpe", fix='pip install "tokar[sweep]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def distribution(dimension: Dimension) -> BaseDistribution:
    """What Optuna draws a dimension from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.ordered:
        first, second, last = (int(dimension.values[i]) for i in (0, 1, -1))
        low, high = min(first, last), max(first, last)
        return IntDistribution(low, high, step=abs(second - first))
    if dimension.values:
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def pruner(config: Pruning | None) -> optuna.pruners.BasePruner:
    """Optuna's pruner for a setting; without one none is stopped."""
    import optuna

    if config is None:
        return optuna.pruners.NopPruner()
    if config.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=0, n_warmup_steps=config.warmup)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.warmup or "auto", reduction_factor=4)


def _give_up_orphans(study: optuna.Study, recorded: Sequence[int]) -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.number not in recorded:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _completed(study: optuna.Study) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _living(study: optuna.Study, number: int) -> optuna.Trial | None:
    import optuna

    found = study.get_trials(deepcopy=False)[number]
    return optuna.Trial(study, found._trial_id) if found.state == optuna.trial.TrialState.RUNNING else None
