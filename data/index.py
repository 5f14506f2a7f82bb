"""The index of a shard: offset, size, label and key of every image in a tar, in one small `.npz` beside it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import UserError
from .files import digest_of, os_errors, whole_file
from .remote import cache_folder
from .tars import TarSample, group, parse_label, scan

INDEX_FORMAT = 1
NO_LABEL = -1
logger = logging.getLogger("tokar.data")


@dataclass
class ShardIndex:
    """Where the images of one tar lie. `n` images.

    Args:
        offset: `[n]` int64, first byte of the image in the tar.
        size: `[n]` int64, bytes.
        label: `[n]` int64, class index, `-1` where the tar gives none.
        key: `[n]` byte strings, UTF-8.
        meta: plain values: `bytes` of the tar, and for prepared shards `sha256`, `settings` and the skipped items `bad`.
    """

    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    key: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offset)

    def same_content(self, other: ShardIndex) -> bool:
        """The two describe the same bytes, labels and keys."""
        names = ("offset", "size", "label", "key")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def save(self, path: Path) -> None:
        """Write the `.npz`, whole or not at all."""
        meta = json.dumps({**self.meta, "format": INDEX_FORMAT})
        with os_errors(path), whole_file(path) as file:
            np.savez(file, offset=self.offset, size=self.size, label=self.label, key=self.key, meta=np.array(meta))

    @classmethod
    def load(cls, path: Path) -> ShardIndex | None:
        """Read an index; `None` when it is missing, damaged or of another format version."""
        try:
            with np.load(path) as arrays:
                meta = json.loads(str(arrays["meta"]))
                index = cls(arrays["offset"], arrays["size"], arrays["label"], arrays["key"], meta)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        return index if meta.get("format") == INDEX_FORMAT else None


def index_path(tar: Path) -> Path:
    """`shard-000000.tar` → `shard-000000.index.npz`."""
    return tar.with_suffix(".index.npz")


def index_samples(samples: list[TarSample], labels: list[int], tar_bytes: int) -> ShardIndex:
    """The index of samples that all have an image; `labels` one each."""
    images = [sample.image for sample in samples if sample.image is not None]
    return ShardIndex(
        np.array([image.offset for image in images], dtype=np.int64),
        np.array([image.size for image in images], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array([sample.key.encode("utf-8", "surrogateescape") for sample in samples], dtype=np.bytes_),
        {"bytes": tar_bytes},
    )


def build_index(tar: Path, classes: list[str]) -> ShardIndex:
    """Index a tar with one scan.

    Args:
        tar: an uncompressed tar of WebDataset samples: one image each, the label in `.cls` or `.json` or absent.
        classes: known class names; empty: labels are any numbers from 0.

    Raises:
        UserError: truncated or damaged tar, a sample without an image, a repeated key, an unknown label.
    """
    samples = group(scan(tar), tar)
    labels, seen = [], set[str]()
    for sample in samples:
        label = NO_LABEL if sample.label is None else parse_label(sample.label, classes)
        problem = "has no image" if sample.image is None else "occurs twice" if sample.key in seen else ""
        if label is None:
            problem = f"has the unknown label {sample.label!r}"
        if problem:
            raise UserError(f"sample {sample.key!r} {problem}", where=tar, fix="run tokar data prepare on these tars")
        seen.add(sample.key)
        labels.append(NO_LABEL if label is None else label)
    return index_samples(samples, labels, tar.stat().st_size)


def open_index(tar: Path, classes: list[str], prepared: bool) -> ShardIndex:
    """The index of a tar: as stored when it is younger than the tar, else built anew and stored.

    A stored index that is older than its tar is compared with a new scan. Equal: it is kept (a copied folder has new
    times). Different: rebuilt with a warning for a plain folder; refused for a prepared one, whose manifest and
    checksums no longer hold.

    Args:
        tar: the shard.
        classes: known class names, may be empty.
        prepared: the shard belongs to a manifest.

    Raises:
        UserError: see above and `build_index`.
    """
    if not tar.exists():
        raise UserError("the shard is missing", where=tar, fix="run tokar data prepare again, or restore the file")
    stat, places = tar.stat(), [index_path(tar), _cached_place(tar)]
    for place in places:
        stored = ShardIndex.load(place)
        if stored is None:
            continue
        if stored.meta.get("bytes") == stat.st_size and place.stat().st_mtime_ns >= stat.st_mtime_ns:
            return stored
        return _renew(tar, classes, prepared, stored, place)
    index = build_index(tar, classes)
    _store(index, places)
    return index


def _renew(tar: Path, classes: list[str], prepared: bool, stored: ShardIndex, place: Path) -> ShardIndex:
    if prepared and stored.meta.get("bytes") != tar.stat().st_size:
        raise UserError(
            "the shard changed after its index was made", where=tar, fix="run tokar data verify, then prepare again"
        )
    fresh = build_index(tar, classes)
    same = stored.same_content(fresh)
    if prepared and not same:
        raise UserError(
            "the shard changed after its index was made", where=tar, fix="run tokar data verify, then prepare again"
        )
    if not same:
        logger.warning("%s: the index is older than its tar; rebuilt", tar)
    fresh.meta = {**stored.meta, **fresh.meta}
    _store(fresh, [place])
    return fresh


def _cached_place(tar: Path) -> Path:
    return cache_folder() / "index" / f"{digest_of(str(tar.resolve()))[:24]}.npz"


def _store(index: ShardIndex, places: list[Path]) -> None:
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            index.save(place)
            return
        except (UserError, OSError):
            continue
    logger.warning("%s: no place to keep the index; it is built at every start", places[0])
