"""How often a thing can be done in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def per_second(action: Callable[[], None], seconds: float, device: torch.device, agree: Callable[[bool], bool] = bool) -> float:
    """Calls per second: the median of those made in `seconds`, at least three, after one to warm up.

    Args:
        action: what is called.
        seconds: to measure.
        device: of its work.
        agree: makes ranks that call it together end together: true on all where it is true on one.
    """
    action()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or not agree(time.perf_counter() - begun >= seconds):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1 / sorted(times)[len(times) // 2]
