"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..conf.spine import Ema as EmaConfig


class Ema:
    """Keeps an fp32 average of the parameters: a ← a + (1 - d)·(w - a) after every step.

    Buffers are not averaged: the saved average takes the module's current ones.

    Args:
        module: what is averaged.
        config: decay d; with `warmup` it is min(d, (1 + n) / (10 + n)) at update n.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.module, self.config = module, config
        self.shadow = [parameter.detach().float().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step `step` (1 for the first)."""
        decay = min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay
        torch._foreach_lerp_(self.shadow, [parameter.detach().float() for parameter in self.module.parameters()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights; the trained ones return bitwise."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.module.parameters(), self.shadow, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own names, its buffers as they are."""
        names = [name for name, _ in self.module.named_parameters()]
        return {**self.module.state_dict(), **dict(zip(names, self.shadow, strict=True))}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take averaged weights from `state`, as `state()` names them."""
        for (name, _), average in zip(self.module.named_parameters(), self.shadow, strict=True):
            average.copy_(state[name])
