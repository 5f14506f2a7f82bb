"""Scores made in parts: by several ranks, or by a run that was interrupted, with the same result as in one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import torch.distributed as dist


class Score(Protocol):
    """A streaming score whose memory does not grow with the number of images."""

    def empty(self) -> Self:
        """A fresh score of the same kind."""

    def merge(self, other: Self) -> None:
        """Add another part of the same set."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


S = TypeVar("S", bound=Score)


def merge_ranks(score: S) -> S:
    """The score of all ranks together, the same on each; `score` itself where there is but one process.

    Parts are merged in the order of the ranks, so that every rank has the same bits.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return score
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, score.state_dict())
    total = score.empty()
    for state in states:
        part = score.empty()
        part.load_state_dict(state)
        total.merge(part)
    return total
