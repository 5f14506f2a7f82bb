"""Exponential moving average of a network's masters: in shards where they are, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..conf.spine import Ema as EmaConfig
from .engines import Engine


class Ema:
    """Keeps an fp32 average of the weights: a ← a + (1 - d)·(w - a) after every step.

    Each rank averages the masters that it updates, without communication. Buffers are not averaged: the saved average
    takes the module's current ones.

    Args:
        engine: what is averaged.
        config: decay d; with `warmup` it is min(d, (1 + n) / (10 + n)) at update n.
    """

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self.engine, self.config = engine, config
        self.shadow = [master.detach().float().clone() for master in engine.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step `step` (1 for the first)."""
        decay = min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay
        torch._foreach_lerp_(self.shadow, [master.detach() for master in self.engine.masters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights; the trained ones return bitwise. Collective where it is sharded."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        held = [master.detach().clone() for master in self.engine.masters]
        for master, average, trained in zip(self.engine.masters, self.shadow, held, strict=True):
            master.detach().copy_(average)
            average.copy_(trained)
        self.engine.publish()

    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self.shadow = [master.detach().float().clone() for master in self.engine.masters]
