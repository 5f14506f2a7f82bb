"""Small habits of writing: whole files or none, one-line errors for a full or closed disk, checksums, JSON."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, of_system


@contextmanager
def os_errors(where: object) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into one line.

    Args:
        where: the file or folder at fault.

    Raises:
        UserError: disk full, no permission, not a folder, or any other `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise of_system(error, where) from error


def check_place(folder: Path) -> None:
    """Prove, without making it, that a folder can be made and written: before long work, not after it.

    Raises:
        UserError: it cannot.
    """
    place = next(place for place in [folder, *folder.parents] if place.exists())
    if not place.is_dir():
        raise UserError("is a file, a folder is needed here", where=place, fix="choose a path that can be used")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError("permission denied", where=place, fix="choose a path that can be used")


def make_folder(path: Path) -> None:
    """Create a folder with its parents and prove that it can be written.

    Raises:
        UserError: it cannot.
    """
    with os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears complete or not at all: temporary name, fsync, rename.

    The temporary name carries the process id: two writers of the same content do not disturb each other.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of a folder; forked workers hold it too, so that those of a killed process are waited for.

    Args:
        folder: an existing folder.
        patience: seconds to wait for it.

    Raises:
        UserError: another process keeps it.
    """
    descriptor, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError("another process is writing here", where=folder, fix="wait until it ends") from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that an interrupted process left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class HashingFile:
    """A writable file that takes the SHA-256 and the length of what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write, digest, count; after a failure, when the file is closed, do nothing."""
        if self.file.closed:  # tarfile flushes an abandoned stream while it is garbage-collected
            return len(data)
        self.digest.update(data)
        self.length += len(data)
        return self.file.write(data)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a plain value through canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with os_errors(path), whole_file(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        fix: what to do when it is missing or damaged.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError("no such file", where=path, fix=fix) from error
    except (OSError, ValueError) as error:
        raise UserError("damaged or not JSON", where=path, fix=fix) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=path, fix=fix)
    return value
