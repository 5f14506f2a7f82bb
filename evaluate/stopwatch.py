"""How long things take, and how often they can be done in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")


def per_second(action: Callable[[], None], seconds: float, device: torch.device, agree: Callable[[bool], bool] = bool) -> float:
    """Calls per second: the median of those made in `seconds`, three at least unless they take thrice as long; one warms up.

    Args:
        action: what is called.
        seconds: to measure.
        device: of its work.
        agree: makes ranks that call it together end together: true on all where it is true on one.
    """
    action()
    times: list[float] = []
    begun = time.perf_counter()
    while True:
        times.append(timed(action, device)[1])
        needed = seconds if len(times) >= 3 else 3 * seconds
        if agree(time.perf_counter() - begun >= needed):
            break
    return 1 / sorted(times)[len(times) // 2]


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    turns: int,
    device: torch.device,
    on_turn: Callable[[int], None] | None = None,
    seconds: float = 0.0,
) -> dict[str, float]:
    """Seconds that each action takes, by name: the median of its turns, after one to warm up.

    They take turns, so that a busy moment of the machine falls on all of them alike.

    Args:
        actions: by name.
        turns: of each, at least.
        device: of their work.
        on_turn: told 1 after each call that counts.
        seconds: to go on for.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    begun = time.perf_counter()
    while min(map(len, times.values())) < turns or time.perf_counter() - begun < seconds:
        for name, action in actions.items():
            times[name].append(timed(action, device)[1])
            if on_turn:
                on_turn(1)
    return {name: median(found) for name, found in times.items()}


def timed(action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What an action gives, and the seconds until its device has done all of it."""
    _finish(device)
    start = time.perf_counter()
    given = action()
    _finish(device)
    return given, time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else "CPU"
