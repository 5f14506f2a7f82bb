"""One shard of a preparation: read, check, convert, write, index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from ..errors import UserError
from .files import HashingFile, os_errors, sha256, whole_file
from .images import BadImageError, centre_crop, decode, encode, is_ordinary, open_picture, resize_shorter, to_rgb
from .index import NO_LABEL, ShardIndex, index_path, index_samples
from .items import Source, SourceItem
from .tars import CAPTION_EXTENSION, group, scan

Encoding = Literal["png", "jpeg", "webp"]
Format = Literal["keep", "png", "jpeg", "webp"]
OnBad = Literal["skip", "fail"]


@dataclass(frozen=True)
class Settings:
    """What decides the content of the shards; a change of any is refused when a preparation is resumed.

    Args:
        source: as the user wrote it.
        items: number of items of the source.
        keys: SHA-256 of their keys and labels.
        size, crop, format, quality, shard_size: see `prepare`.
    """

    source: str
    items: int
    keys: str
    size: int | None
    crop: bool
    format: Format
    quality: int
    shard_size: int


@dataclass(frozen=True)
class Job:
    """One split, ready to be cut into shards.

    Args:
        source: the items.
        order: `[items]` the order in which they are written.
        duplicates: positions in the source whose key came before.
        folder: `out/{split}`.
        settings: see there.
        digest: SHA-256 of the settings, kept in every index.
        on_bad: skip or fail.
    """

    source: Source
    order: np.ndarray
    duplicates: frozenset[int]
    folder: Path
    settings: Settings
    digest: str
    on_bad: OnBad

    @property
    def shards(self) -> int:
        """How many shards the split has."""
        return -(-self.settings.items // self.settings.shard_size)

    def tar(self, shard: int) -> Path:
        """The path of a shard."""
        return self.folder / f"shard-{shard:06d}.tar"


def make_shard(job: Job, shard: int, advance: Callable[[int], None]) -> bool:
    """Write one shard and its index; true if a finished one was kept."""
    tar = job.tar(shard)
    positions = job.order[shard * job.settings.shard_size : (shard + 1) * job.settings.shard_size]
    if (index := _finished(tar, job.digest)) is not None:
        advance(len(positions))
        if index.meta["bad"] and job.on_bad == "fail":
            first = index.meta["bad"][0]
            raise _refusal(first["key"], first["reason"])
        return True
    bad: list[dict[str, str]] = []
    with os_errors(job.folder), whole_file(tar) as file:
        hashing = HashingFile(file)
        labels = _write_samples(job, positions, hashing, bad, advance)
    with os_errors(job.folder):
        index = index_samples(group(scan(tar), tar), labels, hashing.length)
    index.meta |= {"sha256": hashing.digest.hexdigest(), "settings": job.digest, "bad": bad}
    index.save(index_path(tar))
    return False


def _finished(tar: Path, digest: str) -> ShardIndex | None:
    index = ShardIndex.load(index_path(tar))
    if index is None or index.meta.get("settings") != digest or not tar.exists():
        return None
    whole = tar.stat().st_size == index.meta["bytes"] and sha256(tar) == index.meta["sha256"]
    return index if whole else None


def _write_samples(
    job: Job, positions: np.ndarray, file: HashingFile, bad: list[dict[str, str]], advance: Callable[[int], None]
) -> list[int]:
    from webdataset import TarWriter

    labels: list[int] = []
    writer = TarWriter(file, mtime=0, encoder=False, compress=False)
    for position in positions.tolist():
        item = job.source.item(position)
        try:
            extension, data = _convert(item, position in job.duplicates, job.settings)
            beside = {} if item.label is None else {"cls": str(item.label).encode()}
            if item.caption is not None:
                beside[CAPTION_EXTENSION] = item.caption()
            writer.write({"__key__": item.key, extension: data, **beside})
            labels.append(NO_LABEL if item.label is None else item.label)
        except (BadImageError, ValueError) as error:
            reason = error.what if isinstance(error, BadImageError) else str(error)
            if job.on_bad == "fail":
                raise _refusal(item.key, reason) from error
            bad.append({"key": item.key, "reason": reason})
        advance(1)
    writer.close()
    return labels


def _refusal(key: str, reason: str) -> UserError:
    return UserError(reason, where=key, fix="mend or remove it, or use on_bad=skip")


def _convert(item: SourceItem, duplicate: bool, settings: Settings) -> tuple[str, bytes]:
    """Extension and bytes of one sample.

    Raises:
        BadImageError: the item cannot be used.
    """
    if item.problem:
        raise BadImageError(item.problem)
    if duplicate:
        raise BadImageError("duplicate key")
    data = item.read()
    picture = open_picture(data)
    own = {"JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}.get(picture.format or "", "png")
    wanted = cast(Encoding, own if settings.format == "keep" else settings.format)
    fits = settings.size is None or _has_size(picture.size, settings)
    if fits and own == wanted and is_ordinary(data, picture):
        decode(data)  # notices damage that Pillow shows as grey
        return _suffix(wanted), data
    pixels = decode(data) if picture.mode == "RGB" else np.asarray(to_rgb(picture))
    if settings.size is not None:
        pixels = resize_shorter(pixels, settings.size)
        pixels = centre_crop(pixels, settings.size) if settings.crop else pixels
    return _suffix(wanted), encode(pixels, wanted, settings.quality)


def _has_size(size: tuple[int, int], settings: Settings) -> bool:
    return min(size) == settings.size and (not settings.crop or max(size) == settings.size)


def _suffix(format: str) -> str:
    return "jpg" if format == "jpeg" else format
