"""LARS, the optimizer of MAE's linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose step is as long as a share of the weight (You et al. 2017), no weight decay.

    u = (η ‖w‖/‖g‖) g for matrices, u = g for vectors; m = μ m + u; w = w - lr·m.

    Args:
        parameters: to optimise.
        lr: learning rate.
        momentum: μ.
        trust: η.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient stay."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        update = weight.grad
        assert update is not None
        if weight.ndim > 1:
            norm, length = weight.norm(), update.norm()
            update = update * torch.where((norm > 0) & (length > 0), group["trust"] * norm / length, 1.0)
        state = self.state[weight]
        momentum = state.setdefault("momentum", torch.zeros_like(weight))
        momentum.mul_(group["momentum"]).add_(update)
        weight.sub_(momentum, alpha=group["lr"])
