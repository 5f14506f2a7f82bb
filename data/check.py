"""Looking at prepared shards: what is in them, and whether they are still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .files import os_errors, read_json, sha256
from .images import BadImageError, centre_crop, decode, resize_shorter
from .index import ShardIndex, build_index, index_path
from .shards import MANIFEST_NAME, ImageDataset

GRID = 8


def inspect(folder: str | Path, grid: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """What a folder of shards holds.

    Args:
        folder: `out` or `out/{split}` of a preparation, or a folder of WebDataset tars.
        grid: path of a PNG with the first 64 images, 128 pixels each at most; of the first split.

    Returns:
        For each split: `count`, `skipped`, `classes`, `per_class` (name to count), `shards`, `bytes`,
        `sizes` (of the first 100 images, "H×W" to count), `first_keys`, `source`.

    Raises:
        UserError: no shards, or they cannot be read.
    """
    datasets = {name: ImageDataset(path, name) for name, path in _split_folders(Path(folder)).items()}
    if grid is not None:
        _draw(next(iter(datasets.values())), Path(grid))
    return {name: _describe(dataset) for name, dataset in datasets.items()}


def _split_folders(folder: Path) -> dict[str, Path]:
    """Name and path of every split below (or at) a folder."""
    if any(folder.glob("*.tar")) or (folder / MANIFEST_NAME).exists():
        return {folder.name: folder}
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_dir() and any(path.glob("*.tar"))}
    if not found:
        raise UserError("no shards here", where=folder, fix="run tokar data prepare first")
    return found


def _describe(dataset: ImageDataset) -> dict[str, Any]:
    counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=len(dataset.classes)).tolist()
    sizes: dict[str, int] = {}
    for data in dataset.read_many(range(min(100, len(dataset)))):
        height, width = decode(data).shape[:2]
        sizes[f"{height}×{width}"] = sizes.get(f"{height}×{width}", 0) + 1
    return {
        "count": len(dataset),
        "skipped": dataset.manifest.get("skipped", 0),
        "classes": len(dataset.classes),
        "per_class": dict(zip(dataset.classes, counts, strict=False)),
        "shards": len(dataset.tars),
        "bytes": dataset.stored_bytes,
        "sizes": sizes,
        "first_keys": [dataset.key(i) for i in range(min(5, len(dataset)))],
        "source": dataset.manifest.get("settings", {}).get("source", ""),
    }


def _draw(dataset: ImageDataset, path: Path) -> None:
    from PIL import Image

    pictures = [decode(data) for data in dataset.read_many(range(min(GRID * GRID, len(dataset))))]
    side = min(128, max(min(picture.shape[:2]) for picture in pictures))
    canvas = np.full((GRID * side, GRID * side, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // GRID * side, i % GRID * side
        canvas[y : y + side, x : x + side] = centre_crop(resize_shorter(picture, side), side)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas).save(path)


def verify(folder: str | Path, decode_all: bool = False) -> list[str]:
    """Every way in which prepared shards differ from what was written, one line each; empty when all is well.

    Args:
        folder: `out` or `out/{split}`.
        decode_all: also decode every image.

    Raises:
        UserError: there are no shards.
    """
    return [line for path in _split_folders(Path(folder)).values() for line in _verify_split(path, decode_all)]


def _verify_split(folder: Path, decode_all: bool) -> list[str]:
    if not (folder / MANIFEST_NAME).exists():
        return [f"{folder}: no manifest.json; the preparation was interrupted or the tars come from elsewhere"]
    try:
        manifest = read_json(folder / MANIFEST_NAME, "prepare again")
        entries, classes = manifest["shards"], manifest["classes"]
    except (UserError, KeyError) as error:
        return [f"{folder / MANIFEST_NAME}: damaged manifest ({error})"]
    lines, keys = [], dict[bytes, str]()
    for entry in entries:
        lines += _verify_shard(folder / entry["name"], entry, classes, keys, decode_all)
    listed = {entry["name"] for entry in entries}
    lines += [f"{tar}: not in the manifest" for tar in sorted(folder.glob("*.tar")) if tar.name not in listed]
    if sum(entry["count"] for entry in entries) != manifest.get("count"):
        lines.append(f"{folder / MANIFEST_NAME}: the counts of the shards do not add up")
    return lines


def _verify_shard(tar: Path, entry: dict[str, Any], classes: list[str], keys: dict[bytes, str], decode_all: bool) -> list[str]:
    if not tar.exists():
        return [f"{tar}: the shard is missing"]
    lines = []
    if sha256(tar) != entry["sha256"]:
        lines.append(f"{tar}: the checksum differs from the manifest")
    index = ShardIndex.load(index_path(tar))
    if index is None:
        lines.append(f"{index_path(tar)}: the index is missing or damaged")
    try:
        # labels out of range, truncated tars and repeated keys inside a tar are refused here
        fresh = build_index(tar, classes)
    except UserError as error:
        return [*lines, str(error)]
    if index is not None and not index.same_content(fresh):
        older = index_path(tar).stat().st_mtime_ns < tar.stat().st_mtime_ns
        lines.append(f"{index_path(tar)}: the index does not describe its tar" + (" and is older than it" if older else ""))
    if len(fresh) != entry["count"]:
        lines.append(f"{tar}: {len(fresh)} images, the manifest says {entry['count']}")
    if classes and (fresh.label < 0).any():
        lines.append(f"{tar}: {int((fresh.label < 0).sum())} samples without a label")
    for key in fresh.key.tolist():
        if keys.setdefault(key, tar.name) != tar.name:
            lines.append(f"{tar}: key {key.decode('utf-8', 'replace')!r} is also in {keys[key]}")
    return lines + (_undecodable(tar, fresh) if decode_all else [])


def _undecodable(tar: Path, index: ShardIndex) -> list[str]:
    lines = []
    with open(tar, "rb") as file:
        for offset, size, key in zip(index.offset.tolist(), index.size.tolist(), index.key.tolist(), strict=True):
            file.seek(offset)
            try:
                decode(file.read(size))
            except BadImageError as error:
                lines.append(f"{tar}: {key.decode('utf-8', 'replace')}: {error}")
    return lines
