"""The images that others are compared with: a split of a data set, in order, prepared as its training images are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..conf.spine import Data
from ..data.captions import Captions
from ..data.shards import ImageDataset
from ..data.stream import Stream
from ..data.transforms import Augment
from .protocol import content_id
from .ranks import Source

Images = tuple[Source, int, dict[str, Any]]
"""Source of a set of images, how many they are, and the facts that name them."""


def plain_split(data: Data, split: str) -> ImageDataset:
    """A split without augmentation: centre-cropped where training crops at random."""
    crop = "center" if data.crop == "random" else data.crop
    return ImageDataset(data.path, split, transform=Augment(data.image_size, crop=crop), decoder=data.decoder)


def augmented_split(data: Data, split: str) -> ImageDataset:
    """A split cropped and mirrored at random where `data` says so."""
    transform = Augment(data.image_size, crop=data.crop, flip=data.flip)
    return ImageDataset(data.path, split, transform=transform, decoder=data.decoder)


def captions_of(data: Data, split: str, count: int) -> list[str]:
    """The captions of the first `count` images of a split, from the beginning again where it has fewer.

    Raises:
        UserError: one has none.
    """
    images = plain_split(data, split)
    captions = Captions(images)
    known = [captions.read(i) for i in range(min(count, len(images)))]
    return [known[i % len(known)] for i in range(count)]


def facts_of(data: Data, split: str, samples: ImageDataset, count: int) -> dict[str, Any]:
    """What names the first `count` images of a split, for a protocol."""
    return {"source": data.source, "split": split, "images": count, "image_size": data.image_size, "crop": data.crop,
            "content": content_id({"shards": [shard["sha256"] for shard in samples.manifest.get("shards", [])]})}  # fmt: skip


def split_images(data: Data, split: str, count: int | None = None) -> Images:
    """Source of the first `count` images (`None`: all) of a split, how many they are, and the facts that name them."""
    samples = plain_split(data, split)
    total = min(count or len(samples), len(samples))
    stream = Stream(samples, batch_size=1, seed=0, shuffle=False, workers=data.workers)
    return stream.visit, total, facts_of(data, split, samples, total)


def reference_batches(
    data: Data, split: str, batch_size: int, count: int | None
) -> tuple[Iterator[dict[str, Tensor]], int, dict[str, Any]]:
    """Batches of the first `count` images (`None`: all), how many they are, and the facts that name them."""
    samples = plain_split(data, split)
    total = min(count or len(samples), len(samples))
    stream = Stream(samples, batch_size=batch_size, seed=0, shuffle=False, workers=data.workers)
    return stream.once(total), total, facts_of(data, split, samples, total)
