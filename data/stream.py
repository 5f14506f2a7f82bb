"""The exact stream: global batch number n holds the same samples on any number of ranks and workers.

The endless order visits epoch after epoch; sample p of it is element `p % N` of epoch `p // N`. The only state is p.
Shapes: `N` samples in the data set, `B` the global batch, `b` the samples of one micro-batch.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from .randoms import permutation
from .shards import ImageDataset, SampleTransform

Batch = dict[str, Tensor]
Samples = tuple[np.ndarray, np.ndarray]
"""Sample numbers and the epoch of each, `[b]` int64."""


_TRAINERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class Dataset(Protocol):
    """What the stream needs of a data set; `ImageDataset` and `CodeDataset` are the two."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Arrays of `b` rows (`image` or `codes`, and `label`), a pure function of the arguments.

        Args:
            indices: `[b]` sample numbers.
            epochs: `[b]` the epoch of each: with `seed` and the number it decides crop, flip or view.
            seed: of the run.
        """


class Stream:
    """Batches of a data set from any position.

    Args:
        dataset: see `Dataset`.
        batch_size: global, over all ranks and micro-batches.
        seed: decides order and augmentation, 0 or more.
        rank: of this process; it gets its contiguous share of each global batch (as `np.array_split` cuts it).
        world: number of processes.
        accumulate: micro-batches per step and rank, again as `np.array_split` cuts.
        workers: processes that read and decode; 0: a thread of this one, a micro-batch ahead.
        shuffle: false: the order of the data set in every epoch.
        transform: replaces the transform of an `ImageDataset`.
        prefetch: micro-batches in flight per worker.
        pin: page-locked memory for faster copies to a GPU.

    Raises:
        UserError: a batch smaller than the number of micro-batches it is cut into, or an empty data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        shuffle: bool = True,
        transform: SampleTransform | None = None,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("the data set is empty", fix="prepare or encode the data first")
        if batch_size < world * accumulate:
            what = f"a batch of {batch_size} cannot be cut for {world} ranks × {accumulate} micro-batches"
            raise UserError(what, where="batch_size", fix="use a larger batch or fewer ranks or micro-batches")
        if not 0 <= rank < world or seed < 0:
            raise UserError(f"rank {rank} of {world} with seed {seed} makes no sense", fix="rank 0…world-1 and a seed ≥ 0")
        if transform is not None:
            if not isinstance(dataset, ImageDataset):
                raise UserError("only images take a transform", fix="leave it out: the views of codes were fixed when encoding")
            dataset = dataset.with_transform(transform)
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.workers, self.prefetch, self.pin = workers, prefetch, pin
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(dataset)))

    def samples(self, position: int) -> Samples:
        """The whole global batch that starts at a position: sample numbers and epochs, `[B]` int64 each."""
        return self._span(np.arange(position, position + self.batch_size))

    def batches(self, position: int) -> Iterator[list[Batch]]:
        """This rank's part of every step from a position on, without end; close the iterator to stop its workers.

        Args:
            position: samples of the endless order that are already consumed.

        Yields:
            The `accumulate` micro-batches of one step. Each holds `image` uint8 `[b, H, W, 3]` or `codes` int64
            `[b, tokens]`, and `label`, `index`, `epoch`, int64 `[b]`. Their sizes differ by one where the global batch
            does not divide: weight the losses by size.

        Raises:
            UserError: what goes wrong with a sample, also inside a worker.
        """
        flat = self._load(self._micro_batches(position))
        while step := list(islice(flat, self.accumulate)):
            yield step

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass in the order of the data set, for evaluation and encoding; every rank its contiguous share.

        Args:
            limit: only the first so many samples; `None`: all.
        """
        count = len(self.dataset) if limit is None else min(limit, len(self.dataset))
        share = np.array_split(np.arange(count), self.world)[self.rank]
        size = max(1, self.batch_size // self.world)
        yield from self.visit(share[start : start + size] for start in range(0, len(share), size))

    def visit(self, wanted: Iterable[np.ndarray]) -> Iterator[Batch]:
        """A batch for each array of sample numbers, in order, as the first epoch has them."""
        yield from self._load((numbers, np.zeros_like(numbers)) for numbers in wanted)

    def _span(self, positions: np.ndarray) -> Samples:
        n = len(self.dataset)
        epochs, inside = positions // n, positions % n
        if not self.shuffle:
            return inside, epochs
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if len(epochs) else ():
            chosen = epochs == epoch
            indices[chosen] = self._order(epoch)[inside[chosen]]
        return indices, epochs

    def _micro_batches(self, position: int) -> Iterator[Samples]:
        while True:
            mine = np.array_split(np.arange(position, position + self.batch_size), self.world)[self.rank]
            yield from (self._span(part) for part in np.array_split(mine, self.accumulate))
            position += self.batch_size

    def _load(self, wanted: Iterable[Samples]) -> Iterator[Batch]:
        fetch = _Fetch(self.dataset, self.seed)
        for batch in self._in_workers(fetch, wanted) if self.workers else self._here(fetch, wanted):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _here(self, fetch: _Fetch, wanted: Iterable[Samples]) -> Iterator[Batch | UserError]:
        """Read a micro-batch ahead: decoders and the steps of a training both leave Python's lock to the other."""
        made = (self._made(fetch, samples) for samples in wanted)
        with ThreadPoolExecutor(1, "reader") as reader:
            coming = reader.submit(next, made, None)
            while (batch := coming.result()) is not None:
                coming = reader.submit(next, made, None)
                yield batch

    def _made(self, fetch: _Fetch, samples: Samples) -> Batch | UserError:
        batch = fetch[samples]
        if self.pin and not isinstance(batch, UserError):
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def _in_workers(self, fetch: _Fetch, wanted: Iterable[Samples]) -> Iterator[Batch | UserError]:
        closing = multiprocessing.RawValue("b", 0)
        # batch_size=None: an element of the sampler is a whole micro-batch, and nothing is collated
        loader: DataLoader[Any] = DataLoader(
            fetch,  # type: ignore[arg-type]
            batch_size=None,
            sampler=wanted,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin,
            worker_init_fn=partial(_start_worker, closing),
            generator=torch.Generator(),  # else it draws a number from the global one, and the run differs from workers=0
        )
        # a signal in the first moments of a worker would meet the handlers of this process: held back until it has its own
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS)
        try:
            batches: Any = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        def stop() -> None:
            closing.value = 1
            # left to the garbage collector or to torch's exit handler, each worker costs five seconds
            batches._shutdown_workers()

        atexit.register(stop)
        try:
            yield from batches
        finally:
            atexit.unregister(stop)
            stop()


class _Fetch:
    """A data set whose items are micro-batches; a user's error comes back as a value, since DataLoader would rewrap it."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, samples: Samples) -> Batch | UserError:
        indices, epochs = samples
        try:
            arrays = self.dataset.fetch(indices, epochs, self.seed)
        except UserError as error:
            return error
        return {name: torch.from_numpy(array) for name, array in {**arrays, "index": indices, "epoch": epochs}.items()}


def _start_worker(closing: Any, worker: int) -> None:
    """A cluster sends its signals to every process: workers ignore them, since the trainer must finish its step and save."""

    def end(number: int, frame: object) -> None:
        if closing.value:
            signal.raise_signal(signal.SIGKILL)

    for number in _TRAINERS:
        signal.signal(number, end if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS)


def to_image(pixels: Tensor) -> Tensor:
    """`[B, H, W, 3]` uint8 to `[B, 3, H, W]` float32 in [-1, 1], `x / 127.5 - 1`; in channels-last memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(image: Tensor) -> Tensor:
    """`[B, 3, H, W]` in [-1, 1] to `[B, H, W, 3]` uint8: `127.5·x + 127.5` rounded half up, clamped to 0…255.

    The rounding of every number we report: ADM's and GigaTok's `(127.5·x + 128)` cut to an integer. Inverse of `to_image`.
    """
    pixels = image.detach().to(torch.float32).mul(127.5).add_(128.0).floor_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
