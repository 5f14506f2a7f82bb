"""Scores made in parts: by several ranks, and by runs that were interrupted, with the same result as in one go.

A set of images is cut into parts, dealt to the ranks. After each part a rank writes what it has, and which images are in it;
the next start, on any number of ranks, merges what it finds and goes on with the images that are in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..data.files import os_errors, whole_file
from ..errors import UserError

Source = Callable[[Sequence[np.ndarray]], Iterator[dict[str, Tensor]]]
"""Gives for each array of images' numbers, in order, a batch with `image` uint8 `[B, H, W, 3]` and what else is known."""


class Score(Protocol):
    """A running state."""

    def state_dict(self) -> dict[str, Any]:
        """All that was added, as plain values and tensors on the CPU."""

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another one of the same kind has seen."""


S = TypeVar("S", bound=Score)
T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """How a set is walked through; of no influence on the result.

    Args:
        batch_size: images at once.
        save_every: images of a rank after which its state is written.
        folder: of the states; `None`: nothing is written.
        on_batch: told the number of images after each batch.
    """

    batch_size: int = 64
    save_every: int = 2048
    folder: Path | None = None
    on_batch: Callable[[int], None] = lambda count: None


def this_rank() -> tuple[int, int]:
    """Number of this process and of all; (0, 1) without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def accumulate(
    make: Callable[[], S],
    source: Source,
    count: int,
    step: Callable[[S, dict[str, Tensor]], None],
    pace: Pace,
    wanted: np.ndarray | None = None,
) -> S:
    """The score of a whole set, the same on every rank.

    Args:
        make: an empty score.
        source: of the images.
        count: how many there are.
        step: adds a batch, to which `index` `[B]`, the images' numbers, was added.
        pace: see there. Finished states stay in its folder, and answer the next call without any image.
        wanted: images to look at, `[count]` bool; `None`: all.
    """
    rank, world = this_rank()
    score, held = make(), np.zeros(count, bool)
    if pace.folder and rank == 0:
        states = read_states(pace.folder, count)
        for held_then, state in states:
            score.merge(state)
            held |= held_then
        if len(states) > 1:
            write_state(pace.folder, 0, held, score)
    done = _as_first(held)  # nodes may see different folders; nobody writes before the first has read
    todo = ~done if wanted is None else wanted & ~done
    pace.on_batch(count - int(todo.sum()))
    parts = _cut(np.flatnonzero(todo), pace.save_every)[rank::world]
    ends = {int(part[-1]): part for part in parts}
    batches = [numbers for part in parts for numbers in _cut(part, pace.batch_size)]
    for numbers, batch in zip(batches, source(batches), strict=True):
        step(score, {**batch, "index": torch.from_numpy(numbers)})
        pace.on_batch(len(numbers))
        if pace.folder and (last := int(numbers[-1])) in ends:
            held[ends[last]] = True
            write_state(pace.folder, rank, held, score)
    total = merge_ranks(make, score)
    if pace.folder and rank == 0:
        _leave_one(pace.folder, np.ones(count, bool), total, world)
    return total


def _leave_one(folder: Path, held: np.ndarray, total: Score, world: int) -> None:
    """The whole score in the first rank's file, and no other file."""
    others = [path for path in _files(folder) if path != _file(folder, 0)]
    if others or world > 1:
        write_state(folder, 0, held, total)
    for path in others:
        path.unlink(missing_ok=True)


def _cut(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def merge_ranks(make: Callable[[], S], score: S) -> S:
    """The score of all ranks together, merged in their order so that each has the same bits; `score` itself of one process."""
    if this_rank()[1] == 1:
        return score
    total = make()
    for state in gathered(score.state_dict()):
        total.merge(state)
    return total


def gathered(value: T) -> list[T]:
    """Of every rank, in their order."""
    _, world = this_rank()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _as_first(array: np.ndarray) -> np.ndarray:
    """The first rank's."""
    if this_rank()[1] == 1:
        return array
    told = [array]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.pt"))


def write_state(folder: Path, rank: int, held: np.ndarray, score: Score) -> None:
    """Write a score and the images in it, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(_file(folder, rank)) as file:
            torch.save({"held": torch.from_numpy(held), "score": score.state_dict()}, file)


def read_states(folder: Path, count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """The images and the state of each file, no image twice.

    A start that was killed before it removed them leaves files whose images all are in a larger one: those are left out.

    Raises:
        UserError: a file cannot be read, or is of another set of images.
    """
    found = []
    for path in _files(folder):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            found.append((content["held"].numpy(), content["score"]))
        except Exception as error:  # a broken pickle raises nearly anything
            raise UserError("no readable state of an evaluation", where=path, fix="delete the file") from error
    seen, kept = np.zeros(count, bool), []
    for held, state in sorted(found, key=lambda pair: -int(pair[0].sum())):
        if len(held) != count:
            raise UserError(f"a state of {len(held)} images, not {count}", where=folder, fix="delete the folder")
        if not (seen & held).any():
            kept.append((held, state))
            seen |= held
    return kept
