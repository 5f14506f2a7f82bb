"""Learning-rate factors as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ..conf.spine import Optim, ScheduleConfig
from .clock import Clock


def factor(config: ScheduleConfig, clock: Clock) -> float:
    """The learning rate of the step about to be taken, as a factor of `optim.lr`, in [0, 1].

    Warm-up rises linearly from `first` (exclusive) to 1 over the first `warmup` steps. After it, with p the progress through
    the rest: `constant` 1; `linear` 1 until p = `hold`, then → floor (VAR's `lin0`: hold 0.05); `cosine` half a cosine
    1 → floor; `wsd` 1, then over the last share `decay`
    floor + (1 - floor)·(1 - sqrt(q)) with q the progress through that share (the WSD schedule of GigaTok's generators);
    `drops` floor + (1 - floor)·dropⁿ after n of the `drops`, which count from the start of the run (Open-MAGVIT2, IBQ).
    """
    warmup = clock.steps(config.warmup)
    if clock.step < warmup:
        return config.first + (1 - config.first) * (clock.step + 1) / warmup
    progress = min(1.0, (clock.step - warmup) / max(1, clock.total - warmup))
    return config.floor + (1 - config.floor) * _shape(config, clock, progress)


def _shape(config: ScheduleConfig, clock: Clock, progress: float) -> float:
    match config.kind:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return min(1.0, (1 - progress) / (1 - config.hold))
        case "wsd" if config.decay > 0:
            return 1 - math.sqrt(max(0.0, (progress - (1 - config.decay)) / config.decay))
        case "drops":
            return config.drop ** sum(clock.step >= clock.steps(time) for time in config.drops)
        case _:
            return 1.0


def weight_decay(config: Optim, clock: Clock) -> float:
    """The weight decay of the step about to be taken: half a cosine from `weight_decay` to `weight_decay_end` (VAR's)."""
    if config.weight_decay_end is None:
        return config.weight_decay
    progress = clock.step / max(1, clock.total - 1)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * share
