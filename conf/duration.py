"""How long: a number of steps, samples or epochs, as users write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_MULTIPLES = {"": 1, "k": 1_000, "m": 1_000_000}
_FORM = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([km]?)\s*(steps?|samples?|epochs?)?\s*$", re.IGNORECASE)
_HINT = 'write 2000, "2k steps", "500k samples" or "3 epochs"'


@dataclass(frozen=True)
class Duration:
    """A length of training: `value` of `unit` (`step`, `sample` or `epoch`)."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Read `2000`, `"2k steps"`, `"500k samples"` or `"3 epochs"`; a bare number means steps.

        Raises:
            ValueError: not such a text.
        """
        match = _FORM.match(str(text)) if isinstance(text, int | float | str) and not isinstance(text, bool) else None
        if match is None:
            raise ValueError(f"{text!r} is not a duration; {_HINT}")
        number, multiple, unit = match.groups()
        return cls(float(number) * _MULTIPLES[multiple.lower()], (unit or "step").lower().rstrip("s"))

    def steps(self, batch_size: int, dataset_size: int) -> int:
        """Optimizer steps of `batch_size` samples each, rounded up, on a data set of `dataset_size` samples."""
        samples_per_unit = {"step": batch_size, "sample": 1, "epoch": dataset_size}[self.unit]
        return -int(-(self.value * samples_per_unit) // batch_size)

    def __str__(self) -> str:
        plural = "" if self.value == 1 else "s"
        return f"{self.value:g} {self.unit}{plural}"
