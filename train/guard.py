"""Bad steps are skipped on the device, read by the host late, and answered by going back to a checkpoint.

A step is bad when its loss over all ranks is not finite, when it lies `spike` spreads above its running mean, or when a
network's gradient is not finite. The decision is made of what was summed over ranks, so all ranks make the same one, and of
tensors alone, so no rank waits for its device. The same sum carries the wish to stop. The host reads a step's verdict at once
on a CPU and `DELAY` steps later on a GPU, on every rank at the same boundary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..conf.spine import Guard as GuardConfig
from ..errors import UserError
from .clock import Clock
from .network import Network, Update
from .strategy import Workers

DELAY = 2
"""Steps between a verdict on a GPU and its reading: by then it has arrived, unless the host runs further ahead than that."""
HORIZON = 100
"""Good steps that the running mean and spread look back on; until there were so many, they weigh all alike."""
FLOOR = 0.01
"""A spread below this share of the mean counts as this share: a loss that hardly moves would call every wobble a spike."""


class Diverged(UserError):  # noqa: N818 - said by all ranks at once, told by one
    """Going back did not help, or there was nothing to go back to."""


@dataclass(frozen=True)
class Verdict:
    """What the host reads about one step.

    Args:
        clock: after the step.
        loss: over all ranks.
        mean: of the losses of good steps before it.
        spread: their standard deviation.
        spike: it was skipped as a spike.
        row: bad steps in a row up to this one; 0 for a good one.
        stop: a rank was asked to stop.
        skipped: networks that were not updated.
    """

    clock: Clock
    loss: float
    mean: float
    spread: float
    spike: bool
    row: int
    stop: bool
    skipped: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why the step is bad, one clause."""
        if self.spike:
            distance = (self.loss - self.mean) / self.spread
            return f"the loss {self.loss:.4g} is {distance:.1f} spreads above its mean {self.mean:.4g}"
        if not torch.tensor(self.loss).isfinite():
            return f"the loss is {self.loss}"
        return f"the gradient of the {' and the '.join(self.skipped)} is not finite"


@dataclass(frozen=True)
class Findings:
    """What a boundary's reading brought.

    Args:
        bad: verdicts on skipped steps, in order.
        trip: the one with which there were too many in a row.
        stop: the run was asked to stop.
    """

    bad: list[Verdict] = field(default_factory=list)
    trip: Verdict | None = None
    stop: bool = False

    def bad_at(self, clock: Clock) -> bool:
        """The step that ended at `clock` is among the bad ones."""
        return bool(self.bad) and self.bad[-1].clock == clock


class _Unread(NamedTuple):
    clock: Clock
    values: Tensor
    arrived: torch.cuda.Event | None


class Guard:
    """Decides on the device whether a step counts, and tells the host.

    A step calls `begin`, `judge` and `conclude` in this order, a boundary calls `read`.

    Args:
        config: what is bad, and how much of it is too much.
        networks: that are trained; what their forwards change (statistics, moving codebooks) is put back when they are skipped.
        workers: whose losses are summed.
        delay: steps until a verdict is read; `None`: 0 on a CPU, `DELAY` on a GPU.
    """

    def __init__(
        self, config: GuardConfig, networks: Mapping[str, Network], workers: Workers, delay: int | None = None
    ) -> None:
        self.config, self.workers = config, workers
        self.delay = delay if delay is not None else DELAY if workers.device.type == "cuda" else 0
        self.state = torch.zeros(4, dtype=torch.float64, device=workers.device)
        """Good steps so far, mean and variance of their loss, bad steps in a row."""
        self.rollbacks, self.place = 0, 0
        self._networks = dict(networks)
        self._places = {name: _statistics(network.module) for name, network in networks.items()}
        self._before: dict[str, list[Tensor]] = {}
        self._unread: deque[_Unread] = deque()

    def begin(self) -> None:
        """Remember what forwards change, before a step's first one."""
        self._before = {name: [getattr(*place).clone() for place in places] for name, places in self._places.items()}
        for network in self._networks.values():
            network.remember()

    @torch.no_grad()
    def judge(self, loss: Tensor, *, stop: bool) -> Tensor:
        """Whether the step must not count, as a bool tensor `[]` that is the same on all ranks.

        Args:
            loss: this rank's part of the loss: the parts of all ranks add up to it.
            stop: this rank was asked to stop.
        """
        part = torch.stack([loss.double(), torch.full_like(loss, float(stop), dtype=torch.float64)])
        self._loss, self._stop = self.workers.sum(part).unbind()
        good, mean, variance, _ = self.state.unbind()
        self._spread = torch.maximum(variance.sqrt(), FLOOR * mean.abs()).clamp(min=torch.finfo(torch.float64).tiny)
        limit = float("inf") if self.config.spike is None else self.config.spike
        self._spike = self._loss.isfinite() & (good >= self.config.warmup) & (self._loss - mean > limit * self._spread)
        self._veto = self._spike | ~self._loss.isfinite()
        return self._veto

    @torch.no_grad()
    def conclude(self, clock: Clock, results: Mapping[str, Update | None]) -> Tensor:
        """Count the step, good or bad; returns whether it is bad, as a bool tensor `[]`.

        Args:
            clock: after the step.
            results: of the networks' updates; `None`: not its turn.
        """
        skipped = {name: self._veto | result.skipped.bool() for name, result in results.items() if result is not None}
        for name, flag in skipped.items():
            for place, before in zip(self._places[name], self._before[name], strict=True):
                value = getattr(*place)
                value.copy_(torch.where(flag, before, value))
        flags = torch.stack([skipped.get(name, torch.zeros_like(self._veto)) for name in self._places])
        bad = self._veto | flags.any()
        good, mean, variance, row = self.state.unbind()
        rate = (1 / (good + 1)).clamp(min=1 / HORIZON)
        step = self._loss - mean  # exponentially weighted mean and variance, as in Finch 2009
        moved = torch.stack([good + 1, mean + rate * step, (1 - rate) * (variance + rate * step**2), torch.zeros_like(row)])
        verdict = [self._loss, self._stop, mean, self._spread, self._spike, torch.where(bad, row + 1, 0.0)]
        self.state = torch.where(bad, torch.stack([good, mean, variance, row + 1]), moved)
        self._send(clock, torch.cat([torch.stack([value.double() for value in verdict]), flags.double()]))
        return bad

    def _send(self, clock: Clock, values: Tensor) -> None:
        if values.device.type != "cuda":
            self._unread.append(_Unread(clock, values, None))
            return
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._unread.append(_Unread(clock, host, arrived))

    def read(self, clock: Clock, *, everything: bool) -> Findings:
        """Read the verdicts that are due; all there are when one of them is more than a single bad step.

        Args:
            clock: now.
            everything: whether or not they are due.
        """
        bad, trip, stop = [], None, False
        while self._unread and (everything or stop or trip or self._unread[0].clock.step <= clock.step - self.delay):
            verdict = self._open(self._unread.popleft())
            stop |= verdict.stop
            if verdict.row:
                bad.append(verdict)
            elif verdict.clock.step > self.place:
                self.rollbacks = 0
            if verdict.row >= self.config.patience:
                trip = verdict
        return Findings(bad, trip, stop)

    def _open(self, letter: _Unread) -> Verdict:
        if letter.arrived is not None:
            letter.arrived.synchronize()
        loss, stop, mean, spread, spike, row, *flags = letter.values.tolist()
        skipped = tuple(name for name, flag in zip(self._places, flags, strict=True) if flag)
        return Verdict(letter.clock, loss, mean, spread, bool(spike), int(row), bool(stop), skipped)

    @property
    def gives_up(self) -> bool:
        """It went back as often as it may."""
        return self.rollbacks >= self.config.rollbacks

    def go_back(self, clock: Clock, facts: Mapping[str, Any] | None) -> None:
        """Count a way back from `clock` to a checkpoint, which keeps `facts`; it begins with no bad step before it."""
        self.rollbacks, self.place = self.rollbacks + 1, clock.step
        *seen, _ = facts["state"] if facts is not None else [0.0] * 4
        self.state = torch.tensor([*seen, 0.0], dtype=torch.float64, device=self.workers.device)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"state": self.state.tolist(), "rollbacks": self.rollbacks, "place": self.place}

    def restore(self, facts: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; `None`: from one without a guard."""
        if facts is not None:
            self.state = torch.tensor(facts["state"], dtype=torch.float64, device=self.workers.device)
            self.rollbacks, self.place = facts["rollbacks"], facts["place"]


def _statistics(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where lies what a forward may change beside parameters: buffers that a checkpoint holds; the others are constants."""
    found = []
    for part in module.modules():
        buffers = [name for name, value in part._buffers.items() if value is not None]
        found += [(part, name) for name in buffers if name not in part._non_persistent_buffers_set]
    return found
