"""How close generated images come to real ones: the measures of a protocol on both, and the numbers that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .protocol import Result
from .ranks import Pace, Source, accumulate
from .reconstruction import ROUNDING
from .score import SampleScore


@dataclass(frozen=True)
class Reference:
    """Real images.

    Args:
        score: the measures that compare, finished; `None`: nothing compares.
        facts: what names the images or the file of statistics.
    """

    score: SampleScore | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def score_of(make: Callable[[], SampleScore], source: Source, count: int, pace: Pace) -> SampleScore:
    """The measures of a set of images, the same on every rank; see `ranks.accumulate`."""
    return accumulate(make, source, count, SampleScore.update, pace, make().wanted)


def evaluate_samples(score: SampleScore, count: int, reference: Reference, subject: Mapping[str, Any] | None = None) -> Result:
    """Numbers of samples that were looked at, with their protocol.

    Args:
        score: of the samples.
        count: number of samples.
        reference: the real images.
        subject: what made the samples: run, checkpoint, guidance, seeds.

    Raises:
        UserError: too few images, or a reference of other features.
    """
    rounding = f"{ROUNDING}, or as stored; neither cropped nor resized"
    protocol = {"count": count, "samples": rounding, **score.protocol()}
    if reference.score is not None:
        protocol["reference"] = {**reference.facts, "measures": reference.score.protocol()["measures"]}
    return Result("generation", score.numbers(reference.score), protocol, dict(subject or {}))
