"""Where a run is: the step and the data position, and how far it goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..conf.duration import Duration


@dataclass(frozen=True)
class Clock:
    """Progress of a run.

    Args:
        step: optimizer updates of the main network done so far; never micro-batches, never the discriminator's.
        samples: the data position: samples consumed so far, over all ranks.
        total: steps of the whole run.
        batch_size: samples per step, over all ranks.
        dataset_size: samples of one epoch.
    """

    step: int
    samples: int
    total: int
    batch_size: int
    dataset_size: int

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction."""
        return self.samples / self.dataset_size

    @property
    def finished(self) -> bool:
        """The run has reached its length."""
        return self.step >= self.total

    def advanced(self) -> Clock:
        """The clock one step later."""
        return replace(self, step=self.step + 1, samples=self.samples + self.batch_size)

    def steps(self, duration: Any) -> int:
        """A duration of the config in steps."""
        return Duration.parse(duration).steps(self.batch_size, self.dataset_size)

    def due(self, period: Any) -> bool:
        """This step is a multiple of `period` (a duration of the config; `None` is never due)."""
        return period is not None and self.step % max(1, self.steps(period)) == 0
