"""How a row of `tokar bench` is measured: what a call does in a second, what it costs, and how far that is from the peak."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..conf.schema import Bench
from ..evaluate.stopwatch import per_second
from .bench_table import Row
from .cost import counted_flops
from .peaks import peak_flops
from .strategy import Workers

_peak = functools.cache(peak_flops)


def measure(config: Bench, workers: Workers, action: Callable[[], None], *, images: int, tokens: int = 0) -> Row:
    """Call `action` for `config.seconds`, and once more to count its FLOPs.

    Args:
        config: of the bench.
        workers: the ranks, which all call it.
        action: one call.
        images: that a call of this rank is about.
        tokens: of an image; 0: it has none.

    Returns:
        `step_ms`, and of all ranks `images_per_s` and `tokens_per_s`; of this rank, where nothing is compiled,
        `gflop_per_image`, `tflops` and `mfu`.
    """
    rate = per_second(action, config.seconds, workers.device, workers.any)
    speed = rate * images * workers.world
    row = {"step_ms": 1000 / rate, "images_per_s": speed, **({"tokens_per_s": speed * tokens} if tokens else {})}
    return row if config.strategy.compile else row | costs(counted_flops(action), rate, images, workers)


def costs(flops: int, rate: float, images: int, workers: Workers) -> Row:
    """The columns that follow from the FLOPs of a call, done `rate` times a second for so many images."""
    peak = _peak(workers.device, workers.config.precision)
    return {"gflop_per_image": flops / images / 1e9, "tflops": flops * rate / 1e12, "mfu": flops * rate / peak}
