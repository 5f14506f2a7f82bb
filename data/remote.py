"""Shards that lie elsewhere: URL and pipe patterns, read by webdataset's `gopen` into a local folder, once."""

from __future__ import annotations

import fcntl
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import UserError
from .files import digest_of, make_folder, os_errors, whole_file

_SCHEME = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*://)")
_COMPRESSED = (".tar.gz", ".tgz")
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where tokar keeps what it can make again: `$TOKAR_CACHE`, else `$XDG_CACHE_HOME/tokar`, else `~/.cache/tokar`."""
    if own := os.environ.get("TOKAR_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tokar"


def is_remote(spec: str) -> bool:
    """The spec is a URL or a `pipe:` command."""
    return bool(_SCHEME.match(spec))


def names_tars(spec: str) -> bool:
    """The spec names tars rather than a folder or a zip."""
    return is_remote(spec) or spec.endswith((".tar", *_COMPRESSED)) or ("{" in spec and "}" in spec)


def expand(spec: str) -> list[str]:
    """Brace patterns (`x-{000..009}.tar`, `{a,b}.tar`, joined with `::`) as webdataset expands them."""
    from braceexpand import braceexpand

    try:
        return [url for part in spec.split("::") for url in braceexpand(part)]
    except ValueError as error:
        raise UserError("unbalanced braces", where=spec, fix="write a pattern such as x-{000..009}.tar") from error


def local_tars(spec: str) -> list[Path]:
    """Local uncompressed tars for a pattern; remote, piped and gzipped ones are fetched into the cache first.

    Raises:
        UserError: a tar is missing or cannot be fetched.
    """
    return [fetch(url) if is_remote(url) or url.endswith(_COMPRESSED) else _existing(Path(url)) for url in expand(spec)]


def fetch(url: str) -> Path:
    """Copy one shard into the cache unless it is there; several processes may ask at once.

    Args:
        url: anything webdataset's `gopen` reads: `https://`, `s3://`, `gs://`, `hf://`, `pipe:command`, a local `.tar.gz`.

    Raises:
        UserError: it cannot be read, or the disk is full.
    """
    folder = cache_folder() / "shards"
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", url.rsplit("/", 1)[-1].split(".tar")[0])[-60:]
    target = folder / f"{name}-{digest_of(url)[:16]}.tar"
    if not target.exists():
        make_folder(folder)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _copy(url, target)
    return target


def _copy(url: str, target: Path) -> None:
    with os_errors(target), whole_file(target) as out:
        for chunk in _chunks(url):
            out.write(chunk)


def _chunks(url: str) -> Iterator[bytes]:
    # gopen lives in the module of the same name that the package shadows with the function
    from webdataset.gopen import gopen

    unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    zipped: bool | None = None
    try:
        with cast(BinaryIO, gopen(url, "rb")) as stream:
            while chunk := stream.read(_CHUNK):
                zipped = chunk[:2] == b"\x1f\x8b" if zipped is None else zipped
                yield unzip.decompress(chunk) if zipped else chunk
    except (OSError, ValueError, zlib.error) as error:
        raise UserError("the shard cannot be read", where=url, fix="check the address or the command") from error
    if zipped is None or (zipped and not unzip.eof):
        raise UserError("the shard is empty or ends too early", where=url, fix="check the address or the command")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError("no such tar", where=path, fix="check the path or the pattern")
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
