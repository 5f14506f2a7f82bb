"""Where the members of a tar lie: one scan of its headers, grouped into samples as WebDataset groups them."""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

BLOCK = 512
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
LABEL_EXTENSIONS = frozenset({"cls", "json"})
CAPTION_EXTENSION = "txt"


class Member(NamedTuple):
    """A regular file inside a tar: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


class TarTruncatedError(UserError):
    """The tar ends too early; `members` holds what is whole."""

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.members: list[Member] = []


@dataclass
class TarSample:
    """The members that share a key.

    Args:
        key: the name up to the first dot of its last part.
        image: the image member, `None` when the sample has none.
        label: what the `.cls` or `.json` member says, as text; `None` when it says nothing.
        caption: the `.txt` member, `None` when the sample has none.
        members: extensions seen.
    """

    key: str
    image: Member | None = None
    label: str | None = None
    caption: Member | None = None
    members: set[str] = field(default_factory=set)


def scan(path: Path) -> list[Member]:
    """All regular files of an uncompressed tar, in order (ustar, GNU long names, pax paths and sizes).

    Raises:
        TarTruncatedError: it ends inside a member or without its end marker.
        UserError: it is missing, compressed or not a tar.
    """
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise TarTruncatedError("the tar is empty", where=path, fix="write or download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _scan(data, path)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=path, fix="check the path") from error


def _scan(data: mmap.mmap, path: Path) -> list[Member]:
    members: list[Member] = []
    try:
        members.extend(_members(data, path))  # on an error, what came before it stays in the list
    except TarTruncatedError as error:
        error.members = members
        raise
    return members


def _members(data: mmap.mmap, path: Path) -> Iterator[Member]:
    position, end, override = 0, len(data), dict[str, str]()
    while True:
        header = data[position : position + BLOCK]
        if header.count(0) == len(header) == BLOCK:
            return
        if len(header) < BLOCK:
            raise TarTruncatedError("the tar is truncated (no end marker)", where=path, fix="write or download it again")
        _check_header(header, path, position)
        kind, size = header[156:157], _number(header[124:136])
        size = int(override.get("size", size)) if kind not in b"xgLK" else size
        content = position + BLOCK
        if content + size > end:
            raise TarTruncatedError("the tar is truncated inside a member", where=path, fix="write or download it again")
        if kind == b"L":
            override["path"] = _text(data[content : content + size])
        elif kind == b"x":
            override.update(_pax(data[content : content + size]))
        elif kind not in b"gK":
            if kind in b"0\0" + b"7":
                yield Member(override.get("path") or _name(header), content, size)
            override = {}
        position = content + -(-size // BLOCK) * BLOCK


def _check_header(header: bytes, path: Path, position: int) -> None:
    stored = _number(header[148:156])
    # the checksum counts its own eight bytes as spaces; Adler-32 ends in 1 + the sum of the bytes, modulo 65521
    blanked = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    if blanked != (stored + 1) % 65521:
        what = "not an uncompressed tar" if position == 0 else f"the tar is damaged at byte {position}"
        raise UserError(what, where=path, fix="write or download it again")


def _number(raw: bytes) -> int:
    if raw[0] & 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0")
    return int(digits, 8) if digits.isdigit() else -1 if digits else 0


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = (
        _text(header[:100]),
        _text(header[345:500]) if header[257:262] == b"ustar" and header[262:263] == b"\0" else "",
    )
    return f"{prefix}/{name}" if prefix else name


def _pax(raw: bytes) -> dict[str, str]:
    values = {}
    while raw:
        length = int(raw[: raw.index(b" ")])
        key, _, value = raw[raw.index(b" ") + 1 : length - 1].partition(b"=")
        values[key.decode()] = value.decode("utf-8", "surrogateescape")
        raw = raw[length:]
    return values


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member name: WebDataset cuts at the first dot of the last part; lower-case extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def group(members: list[Member], path: Path) -> list[TarSample]:
    """Samples of a tar: neighbours with the same key; a repeated extension begins a new sample.

    Args:
        members: from `scan`.
        path: the tar, to read the label members.
    """
    samples: list[TarSample] = []
    with open(path, "rb") as file:
        for member in members:
            key, extension = split_name(member.name)
            base = key.rpartition("/")[2]
            if not base:  # hidden files such as ._x are not samples
                continue
            if not samples or samples[-1].key != key or extension in samples[-1].members:
                samples.append(TarSample(key))
            sample = samples[-1]
            sample.members.add(extension)
            if extension in IMAGE_EXTENSIONS and sample.image is None:
                sample.image = member
            elif extension == CAPTION_EXTENSION:
                sample.caption = member
            elif extension in LABEL_EXTENSIONS:
                file.seek(member.offset)
                found = _label_text(file.read(member.size), extension)
                sample.label = found if extension == "cls" or sample.label is None else sample.label
    return samples


def _label_text(raw: bytes, extension: str) -> str | None:
    text = raw.decode("utf-8", "replace").strip()
    if extension == "cls":
        return text or None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        value = next((value[name] for name in ("label", "cls", "class") if name in value), None)
    return None if value is None or isinstance(value, dict | list) else str(value)


def parse_label(text: str | None, classes: list[str]) -> int | None:
    """The class index that a label member names, by number or by class name; `None` if there is no such class.

    Args:
        text: from `TarSample.label`.
        classes: the known names; empty: any number from 0 is a class.
    """
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        return classes.index(text) if text in classes else None
    label = int(text)
    return label if not classes or label < len(classes) else None
