"""What the loop needs of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ..evaluate.images import Picture
from .clock import Clock
from .network import Network, Trainable

Batch = dict[str, Tensor]
"""`image` uint8 `[B, H, W, 3]` or `codes` `[B, N]`; `label`, `index`, `epoch` int64 `[B]`."""
Networks = Mapping[str, Network]


class Steps(Protocol):
    """What is trained, and how a step of it goes.

    `trainables` names the networks, the main one first; `frozen` are modules that are only used.
    Metrics are scalars, or vectors that count codes (see `logging.Meters`).
    """

    trainables: dict[str, Trainable]
    frozen: list[nn.Module]

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """Call `backward` on networks for one micro-batch and return metrics; the loop updates those that got a gradient."""
        ...


class Stage(Steps, Protocol):
    """The losses of one kind of training. It knows nothing of devices, ranks or files."""

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Metrics of one validation batch, as means over its samples; no gradient."""
        ...

    def draw(self, batch: Batch, networks: Networks) -> Mapping[str, Tensor | Picture]:
        """Pictures by name, or plain images uint8 `[B, H, W, 3]`; may be empty."""
        ...
