"""Checkpoint folders on disk: written by all ranks, whole or not there, verified when they are read.

`checkpoints/step-00001000/` is first `.step-00001000`: every rank writes its files there and then a list of them with sizes
and SHA-256; rank 0 waits for all lists, merges them into the marker `COMPLETE`, written last, and renames the folder.
Ranks meet in the folder only, never in a collective, so a background thread can do it while training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from ..errors import UserError
from ..models.build import MARKER
from ..models.weights import save_weights

FORMAT = 2
"""1 had no parts of several ranks; what it has is read as ever."""
STATE_NAME = "state.json"
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.state["step"])


@dataclass(frozen=True)
class Parcel:
    """What one rank writes of a checkpoint, in host memory.

    Args:
        tensors: by file, with the full shapes of those of which there is only a part (see `weights.save_weights`).
        texts: by file.
    """

    tensors: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Size]]]
    texts: Mapping[str, str]


def write(folder: Path, step: int, parcel: Parcel, rank: int, world: int) -> Path:
    """Write a rank's part; on rank 0 wait for the others' and make the checkpoint count.

    Raises:
        UserError: this rank or another cannot write; nothing half-written counts.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}"
    try:
        _write_part(temporary, parcel, rank)
        if rank == 0:
            _finish(temporary, final, world)
    except OSError as error:
        with contextlib.suppress(OSError):  # the others learn of it by this, if it can be written at all
            (temporary / f"failed-{rank}").touch()
        raise UserError(
            f"the checkpoint cannot be written ({error.strerror or error})",
            where=final,
            fix="free space or permit writing, then start the same command again",
        ) from error
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_part(temporary: Path, parcel: Parcel, rank: int) -> None:
    temporary.mkdir(parents=True, exist_ok=True)
    for name, (tensors, shapes) in parcel.tensors.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        save_weights(tensors, temporary / name, shapes)
    for name, text in parcel.texts.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(text)
    listing = {}
    for name in [*parcel.tensors, *parcel.texts]:
        path = temporary / name
        listing[name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
        _sync(path)
    done = _list_of(temporary, rank)
    done.with_suffix(".tmp").write_text(json.dumps(listing))
    _sync(done.with_suffix(".tmp"))
    done.with_suffix(".tmp").rename(done)


def _list_of(temporary: Path, rank: int) -> Path:
    return temporary / f"rank-{rank}.json"


def _finish(temporary: Path, final: Path, world: int) -> None:
    lists = [_list_of(temporary, rank) for rank in range(world)]
    while not all(path.exists() for path in lists):
        if failed := next(temporary.glob("failed-*"), None):
            raise OSError(f"rank {failed.name.removeprefix('failed-')} could not write its part")
        time.sleep(0.02)
    files: dict[str, Any] = {}
    for path in lists:
        files |= json.loads(path.read_text())
        path.unlink()
    for directory in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        _sync(directory)
    marker = temporary / MARKER
    marker.write_text(json.dumps(dict(sorted(files.items())), indent=1) + "\n")
    _sync(marker)
    _sync(temporary)
    if final.exists():  # the same step again, after a fall back to an older checkpoint
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file or a directory's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problems(path: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one clause each; empty when every file has its size and checksum.

    Args:
        path: of the checkpoint.
        rank: reads every `world`-th file only.
        world: readers that share the work.
    """
    try:
        files = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return ["it has no readable COMPLETE marker"]
    found = []
    for name, facts in list(files.items())[rank::world]:
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            found.append(f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}")
        elif _hash(file) != facts["sha256"]:
            found.append(f"{name} has another checksum")
    return found


def listed(folder: Path) -> list[Path]:
    """Checkpoints below `folder` that have a marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def read_state(path: Path) -> Saved:
    """A checkpoint whose files are sound.

    Raises:
        UserError: a newer version wrote it.
    """
    state = json.loads((path / STATE_NAME).read_text())
    if state["format"] > FORMAT:
        raise UserError(f"checkpoint format {state['format']} is newer than {FORMAT}", where=path, fix="update tokar")
    return Saved(path, state)


def newest(folder: Path, warn: Warn, wrong: Callable[[Path], list[str]] = problems) -> Saved | None:
    """The newest sound checkpoint below `folder`, `None` when there is none at all.

    Args:
        folder: of a run's checkpoints.
        warn: is told of damaged ones.
        wrong: what is wrong with one; ranks that share the work give one that they agree on.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    candidates = listed(folder)
    for path in reversed(candidates):
        found = wrong(path)
        if not found:
            return read_state(path)
        warn(f"{path}: {found[0]}; trying the one before it")
    if candidates:
        raise UserError("every checkpoint is damaged", where=folder, fix="restore one, or remove the folder to start afresh")
    return None


def find(path: Path, warn: Warn, wrong: Callable[[Path], list[str]] = problems) -> Saved:
    """The checkpoint that `path` (a run folder or a checkpoint) means.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / MARKER).exists():
        if found := wrong(path):
            raise UserError(f"the checkpoint is damaged: {found[0]}", where=path, fix="use another checkpoint")
        return read_state(path)
    saved = newest(path / "checkpoints", warn, wrong)
    if saved is None:
        raise UserError("no checkpoint here", where=path, fix="point at a run folder or at checkpoints/step-…")
    return saved


def prune(folder: Path, keep: int, keep_step: Callable[[int], bool]) -> None:
    """Remove all but the newest `keep` checkpoints and those whose step `keep_step` wants."""
    for path in listed(folder)[:-keep]:
        if not keep_step(int(path.name.removeprefix("step-"))):
            (path / MARKER).unlink()  # first: a half-removed checkpoint must not count
            shutil.rmtree(path)


def sweep_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    _remove(folder.glob(".step-*"))
    _remove(path for path in folder.glob("step-*") if path.is_dir() and not (path / MARKER).exists())


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
