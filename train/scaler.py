"""The loss scale of fp16: gradients too small for its range are lifted into it (Micikevicius et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""As `torch.amp.GradScaler`'s: doubled after so many steps without an overflow, halved at one."""


class LossScaler:
    """A scale on the device that every rank moves alike, since it sees the norm over all of them.

    Args:
        device: where it lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)
        self.good = torch.zeros((), device=device)
        """Steps since the last overflow or growth."""

    def update(self, overflow: Tensor) -> None:
        """Move the scale after a step, of which `overflow` says whether its gradient was no number."""
        overflow = overflow.to(self.scale.device)
        good = torch.where(overflow, 0.0, self.good + 1)
        grown = good >= INTERVAL
        factor = torch.where(overflow, BACKOFF, torch.where(grown, GROWTH, 1.0))
        self.scale, self.good = self.scale * factor, torch.where(grown, 0.0, good)

    def answers(self) -> Tensor:
        """True while an overflow can be answered by a smaller scale; below 1 the gradient itself is no number."""
        return self.scale >= 1.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": float(self.scale), "good": float(self.good)}

    def load(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self.scale.fill_(state["scale"])
        self.good.fill_(state["good"])
