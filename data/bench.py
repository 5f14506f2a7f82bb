"""How fast images arrive: our stream beside webdataset's own pipeline, same shards, same decoder, same batch, same run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from .images import HAS_SIMPLEJPEG, decode
from .shards import ImageDataset

ROUNDS = 10
"""The two take turns this often, and medians are reported: a busy moment of the machine spoils one turn, not the number."""


def loader_speed(folder: str | Path, seconds: float = 6.0, batch_size: int = 256, split: str = "train") -> dict[str, Any]:
    """Images per second in one process, shuffled, decoded and assembled to uint8 batches.

    Args:
        folder: prepared shards whose images have one size.
        seconds: in all, half for each.
        batch_size: images per batch.
        split: sub-folder.

    Returns:
        `images_per_s` and `webdataset_images_per_s` (medians of the turns), `ratio` (of the two), `batch_size`,
        `image_size`, `decoder`, `cpus` (those this process may use), `seconds`.
    """
    dataset = ImageDataset(folder, split)
    sides: dict[str, Iterator[int]] = {
        "images_per_s": _ours(dataset, batch_size),
        "webdataset_images_per_s": _webdataset(dataset, batch_size),
    }
    for batches in sides.values():
        next(batches)  # opening files and importing is not what is measured
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, batches in sides.items():
            turns[name].append(_speed(batches, seconds / (2 * ROUNDS)))
    speeds = {name: float(np.median(found)) for name, found in turns.items()}
    return {
        **{name: round(speed, 1) for name, speed in speeds.items()},
        "ratio": round(speeds["images_per_s"] / speeds["webdataset_images_per_s"], 2),
        "batch_size": batch_size,
        "image_size": list(dataset.transform.shape[:2]),
        "decoder": "simplejpeg" if HAS_SIMPLEJPEG else "pil",
        "cpus": len(os.sched_getaffinity(0)),
        "seconds": seconds,
    }


def _speed(batches: Iterator[int], seconds: float) -> float:
    start, images, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        images += next(batches)
        elapsed = time.perf_counter() - start
    return images / elapsed


def _ours(dataset: ImageDataset, batch_size: int) -> Iterator[int]:
    from .stream import Stream

    for (batch,) in Stream(dataset, batch_size=batch_size, seed=0).batches(0):
        yield len(batch["image"])


def _webdataset(dataset: ImageDataset, batch_size: int) -> Iterator[int]:
    import torch
    import webdataset

    def decoded(extension: str, data: bytes) -> np.ndarray | None:
        return decode(data) if extension in (".jpg", ".png", ".webp") else None

    def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

    for epoch in count():
        shards = webdataset.WebDataset(dataset.tars, shardshuffle=len(dataset.tars), seed=epoch).shuffle(1000)
        samples = shards.decode(decoded).to_tuple("jpg;png;webp", "cls").batched(batch_size, collation_fn=collate)
        yield from (len(images) for images, _ in samples)
