"""What the loop needs of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from .clock import Clock
from .network import Network, Trainable

Batch = dict[str, Tensor]
"""`image` uint8 `[B, H, W, 3]` or `codes` `[B, N]`; `label`, `index`, `epoch` int64 `[B]`."""
Networks = Mapping[str, Network]


class Stage(Protocol):
    """The losses of one kind of training. It knows nothing of devices, ranks or files.

    `trainables` names the networks it trains, the main one first; `frozen` are modules it only uses.
    Metrics are scalars, or vectors that count codes (see `logging.Meters`).
    """

    trainables: dict[str, Trainable]
    frozen: list[nn.Module]

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """Call `backward` on networks for one micro-batch and return metrics; the loop updates those that got a gradient."""
        ...

    def evaluate(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Metrics of one validation batch, as means over its samples; no gradient."""
        ...

    def draw(self, batch: Batch, networks: Networks) -> dict[str, Tensor]:
        """Pictures by name, uint8 `[B, H, W, 3]`; may be empty."""
        ...
