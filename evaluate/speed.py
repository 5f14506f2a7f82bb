"""How long samples take: told beside their numbers, and no part of what two results must share to be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .protocol import SECONDS
from .ranks import gathered, this_rank
from .stopwatch import device_name, timed


@dataclass
class Laps:
    """Seconds of batches of images; the first, which warms up, counts only where it is the only one.

    Args:
        first: images and seconds of the first batch.
        images: of all batches behind it.
        seconds: of those.
    """

    first: tuple[int, float] = (0, 0.0)
    images: int = 0
    seconds: float = 0.0

    def add(self, images: int, seconds: float) -> None:
        """One more batch."""
        if not self.first[0]:
            self.first = (images, seconds)
        else:
            self.images, self.seconds = self.images + images, self.seconds + seconds

    @property
    def seconds_per_image(self) -> float:
        """Their mean; 0 where none came."""
        images, seconds = (self.images, self.seconds) if self.images else self.first
        return seconds / images if images else 0.0


def clocked(batches: Iterator[dict[str, Tensor]], laps: Laps, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The same batches, which hold `codes` `[B, T]`; making each is a lap, to its end on the device."""
    while True:
        batch, seconds = timed(lambda: next(batches, None), device)
        if batch is None:
            return
        laps.add(len(batch["codes"]), seconds)
        yield batch


@dataclass(frozen=True)
class Speed:
    """What one process takes for its samples: for their codes, and apart from that for decoding them.

    Args:
        device: that draws.
        batch_size: samples at once.
        drawing: from conditions to codes.
        decoding: from codes to images.
    """

    device: torch.device
    batch_size: int
    drawing: Laps = field(default_factory=Laps)
    decoding: Laps = field(default_factory=Laps)

    def told(self) -> dict[str, Any]:
        """Seconds for an image of the slowest rank, and what they depend on; nothing where no sample was drawn.

        Every rank calls it. Samples that an interrupted start has drawn are not in it.
        """
        found = gathered((self.drawing.seconds_per_image, self.decoding.seconds_per_image))
        seconds, decoding = max(found)
        if not seconds:
            return {}
        return {
            SECONDS: seconds, "decoder_seconds_per_image": decoding, "device": device_name(self.device),
            "batch_size": self.batch_size, "threads": torch.get_num_threads(), "ranks": this_rank()[1],
        }  # fmt: skip
