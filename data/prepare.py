"""From a source to image shards: WebDataset tars with an index beside each and a manifest written last.

A shard is made by one process under a temporary name, then renamed; its index follows and is the proof that it is
finished. What a shard holds depends on the source and the settings only, never on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .check import inspect, verify
from .files import alone_in, digest_of, make_folder, os_errors, read_json, remove_leftovers, whole_file, write_json
from .index import NO_LABEL, ShardIndex, index_path
from .progress import Report, progress_bar
from .randoms import permutation
from .shards import MANIFEST_FORMAT, MANIFEST_NAME, SETTINGS_NAME
from .sources import Source, available_splits, open_source
from .write_shard import Format, Job, OnBad, Settings, make_shard

__all__ = ["inspect", "prepare", "verify"]

BAD_NAME = "bad.jsonl"


SPLIT = "{split}"
"""Stands in a source for the name of each split."""


def prepare(
    source: str,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    size: int | None = None,
    crop: bool = True,
    workers: int = 0,
    shard_size: int = 5000,
    format: Format = "keep",
    quality: int = 95,
    on_bad: OnBad = "skip",
    progress: Report | None = None,
) -> dict[str, Any]:
    """Write a source as WebDataset shards under `out/{split}/`; run again to finish what was interrupted.

    Args:
        source: see `sources.open_source`; `{split}` in it stands for the name of each split.
        out: folder to create.
        splits: which; `None`: all that the source has.
        size: resize the shorter side to this many pixels (ADM's rule); `None`: as they are.
        crop: with `size`, also cut the middle square.
        workers: processes; 0: this one.
        shard_size: items of the source per shard.
        format: of images that must be written anew; `keep`: their own if it is JPEG, PNG or WebP, else PNG. The bytes of
            an upright RGB JPEG or PNG that needs no resizing are kept.
        quality: of JPEG and WebP, 1…100.
        on_bad: `skip` lists a bad item in `bad.jsonl` and goes on; `fail` stops at the first.
        progress: called with images done and images in all; `None`: a progress bar if a console is there.

    Returns:
        For each split: `count`, `skipped`, `shards`, `bytes`, `classes`, `folder`, `seconds`, and `kept`, the shards
        that were there already.

    Raises:
        UserError: bad source, changed settings, a bad item under `fail`, no usable item, an unwritable or full disk.
    """
    _check_options(size, workers, shard_size, format, quality, on_bad)
    chosen = _chosen_splits(source, splits)
    result = {}
    for split in chosen:
        started = time.monotonic()
        spec, folder = source.replace(SPLIT, split), Path(out) / split
        job = _plan(open_source(spec, split), spec, folder, size, crop, shard_size, format, quality, on_bad)
        summary = _run(job, workers, progress, split)
        result[split] = {**summary, "folder": str(folder), "seconds": round(time.monotonic() - started, 2)}
    return result


def _chosen_splits(source: str, splits: Sequence[str] | None) -> list[str]:
    if SPLIT in source:  # a source for each split: what it lacks is said when it is opened
        return list(splits or ("train", "val"))
    offered = available_splits(source)
    chosen = list(splits or offered)
    missing = sorted(set(chosen) - set(offered))
    if len(chosen) > 1 and missing:
        open_source(source, offered[0])  # what is empty says so itself
        fix = f"it has: {', '.join(offered)}; set splits=[{','.join(offered)}]"
        raise UserError(f"no split {missing[0]!r}", where=source, fix=fix)
    return chosen


def _check_options(size: int | None, workers: int, shard_size: int, format: str, quality: int, on_bad: str) -> None:
    if size is not None and size < 1:
        raise UserError(f"size must be at least 1, not {size}", fix="give the side in pixels")
    if workers < 0 or shard_size < 1:
        raise UserError("workers must be at least 0 and shard_size at least 1", fix="correct the number")
    if format not in ("keep", "png", "jpeg", "webp"):
        raise UserError(f"unknown format {format!r}", fix="choose keep, png, jpeg or webp")
    if not 1 <= quality <= 100:
        raise UserError(f"quality must be 1…100, not {quality}", fix="correct the number")
    if on_bad not in ("skip", "fail"):
        raise UserError(f"unknown policy on_bad={on_bad!r}", fix="choose skip or fail")


def _plan(
    source: Source,
    spec: str,
    folder: Path,
    size: int | None,
    crop: bool,
    shard_size: int,
    format: Format,
    quality: int,
    on_bad: OnBad,
) -> Job:
    items = (source.item(i) for i in range(len(source)))
    facts = [(item.key, item.label, *(["caption"] if item.caption else [])) for item in items]
    seen, duplicates = set[Any](), set[int]()
    for i, (key, *_) in enumerate(facts):
        (duplicates.add(i) if key in seen else seen.add(key))
    settings = Settings(spec, len(source), digest_of([facts, source.classes]), size, crop, format, quality, shard_size)
    # classes are mixed so that readers that shuffle only nearby samples see all of them
    order = permutation(0, 0, len(source)) if source.by_class else np.arange(len(source))
    return Job(source, order, frozenset(duplicates), folder, settings, digest_of(asdict(settings)), on_bad)


def _run(job: Job, workers: int, progress: Report | None, split: str) -> dict[str, Any]:
    make_folder(job.folder)
    with alone_in(job.folder):
        _check_settings(job)
        remove_leftovers(job.folder)
        write_json(job.folder / SETTINGS_NAME, asdict(job.settings))
        with progress_bar(progress, job.settings.items, f"prepare {split}") as advance:
            kept = _serial(job, advance) if workers == 0 else _parallel(job, workers, advance)
        return {**_finish(job), "kept": kept}


def _check_settings(job: Job) -> None:
    path = job.folder / SETTINGS_NAME
    if not path.exists():
        if any(job.folder.glob("*.tar")):
            raise UserError("the folder holds other tars", where=job.folder, fix="choose an empty folder")
        return
    before, now = read_json(path, "delete the folder and prepare again"), asdict(job.settings)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        show = {"keys": "the content of the source", "items": "the number of items"}
        what = ", ".join(show.get(name) or f"{name} was {before.get(name)}, now {now[name]}" for name in changed)
        raise UserError(
            f"prepared with other settings ({what})", where=job.folder, fix="choose another folder or delete this one"
        )


def _serial(job: Job, advance: Callable[[int], None]) -> int:
    return sum(make_shard(job, shard, advance) for shard in range(job.shards))


def _parallel(job: Job, workers: int, advance: Callable[[int], None]) -> int:
    # forked workers share the listing of the source; webdataset (and with it torch) is imported once, here
    import webdataset  # noqa: F401

    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(min(workers, job.shards), context, _start_worker, (job, counter, os.getpid())) as pool:
        pending = {pool.submit(_worker_shard, shard) for shard in range(job.shards)}
        try:
            return _collect(pending, counter, advance)
        except BrokenProcessPool as error:
            fix = "check the memory and run again; finished shards are kept"
            raise UserError("a worker process was killed", where=job.folder, fix=fix) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collect(pending: set[Future[bool]], counter: Any, advance: Callable[[int], None]) -> int:
    kept = shown = 0
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        kept += sum(future.result() for future in done)
        counted = counter.value  # read once: workers count on meanwhile
        advance(counted - shown)
        shown = counted
    return kept


_worker: tuple[Job, Any]


def _start_worker(job: Job, counter: Any, parent: int) -> None:
    global _worker
    _worker = (job, counter)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """A killed parent leaves its workers waiting for ever; end with it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _worker_shard(shard: int) -> bool:
    job, counter = _worker

    def advance(n: int) -> None:
        with counter.get_lock():
            counter.value += n

    return make_shard(job, shard, advance)


def _finish(job: Job) -> dict[str, Any]:
    """Write `bad.jsonl` and, last of all, the manifest."""
    indices = [(job.tar(shard), ShardIndex.load(index_path(job.tar(shard)))) for shard in range(job.shards)]
    found = [(tar, index) for tar, index in indices if index is not None]
    bad = [entry for _, index in found for entry in index.meta["bad"]]
    with os_errors(job.folder), whole_file(job.folder / BAD_NAME) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in bad).encode())
    count = sum(len(index) for _, index in found)
    if count == 0:
        what = f"none of the {len(bad)} items can be used, the first: {bad[0]['key']}: {bad[0]['reason']}"
        raise UserError(what, where=job.source.spec, fix=f"see {job.folder / BAD_NAME}")
    labels = np.concatenate([index.label for _, index in found])
    size = job.settings.size
    manifest = {
        "format": MANIFEST_FORMAT,
        "classes": job.source.classes,
        "count": count,
        "skipped": len(bad),
        "per_class": np.bincount(labels[labels != NO_LABEL], minlength=len(job.source.classes)).tolist(),
        "image_size": [size, size] if size is not None and job.settings.crop else None,
        "settings": asdict(job.settings),
        "shards": [_entry(tar, index) for tar, index in found],
    }
    write_json(job.folder / MANIFEST_NAME, manifest)
    size_on_disk = sum(entry["bytes"] for entry in manifest["shards"])
    return {
        "count": count,
        "skipped": len(bad),
        "shards": len(found),
        "bytes": size_on_disk,
        "classes": len(job.source.classes),
    }


def _entry(tar: Path, index: ShardIndex) -> dict[str, Any]:
    return {"name": tar.name, "count": len(index), "bytes": index.meta["bytes"], "sha256": index.meta["sha256"]}
