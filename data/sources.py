"""Where images come from: the bundled digits, class folders, zips of class folders, WebDataset tars (local or remote).

Every source is a list with random access, so that preparation can be parallel and resumed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError, nearest
from .class_folders import FolderSource, ZipSource, split_folders, top_folders, unwrap, walk, zip_names
from .files import read_json
from .images import BadImageError, encode
from .items import Source, SourceItem
from .remote import local_tars, names_tars
from .tars import Member, TarSample, TarTruncatedError, group, parse_label, scan

HOLD_OUT = 6
"""Every sixth digit of each class belongs to `val`: 1,501 train, 296 val."""


def open_source(spec: str, split: str) -> Source:
    """One split of the data set that `spec` names.

    Args:
        spec: `digits`; a folder or zip of class folders, `{class}/*` or `{split}/{class}/*`; a folder of tars, a tar, a
            brace pattern, a URL or `pipe:` command of tars. Data without split folders is one set and answers to any
            split name.
        split: which part.

    Raises:
        UserError: no such source, no such split, or nothing in it.
    """
    source = _open(spec, split)
    if len(source) == 0:
        raise UserError(f"no images for split {split!r}", where=spec, fix="point source to a folder with images")
    return source


def available_splits(spec: str) -> list[str]:
    """The splits that a source offers; `["train"]` for data without split folders.

    Raises:
        UserError: there is no such source.
    """
    if spec == "digits":
        return ["train", "val"]
    path = Path(spec)
    if path.is_dir():
        tars = sorted(child.name for child in path.iterdir() if child.is_dir() and any(child.glob("*.tar")))
        return tars or split_folders(top_folders(*unwrap(*walk(path))[1:])) or ["train"]
    if path.is_file() and path.suffix.lower() == ".zip":
        return split_folders(top_folders(*unwrap(*zip_names(path))[1:])) or ["train"]
    if not names_tars(spec):
        raise _no_source(spec, path)
    return ["train"]


def _no_source(spec: str, path: Path) -> UserError:
    if path.is_file():
        return UserError("not a zip or tar", where=spec, fix="give a folder, a .zip, a .tar or digits")
    return UserError("no such source", where=spec, fix=f"{nearest(spec, ['digits'])} or give an existing folder, zip or tar")


def _open(spec: str, split: str) -> Source:
    path = Path(spec)
    if spec == "digits":
        return Digits(split)
    if names_tars(spec):
        return Tars(spec, local_tars(spec), [])
    if path.is_dir():
        return _open_folder(spec, path, split)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipSource(spec, path, split)
    raise _no_source(spec, path)


def _open_folder(spec: str, path: Path, split: str) -> Source:
    for folder in (path / split, path):
        if tars := sorted(folder.glob("*.tar")):
            manifest = folder / "manifest.json"
            classes = read_json(manifest, "prepare the data again").get("classes", []) if manifest.exists() else []
            return Tars(spec, tars, classes)
    if any(path.glob("*/*.tar")):
        raise UserError(f"no split {split!r}", where=spec, fix=f"it has: {', '.join(available_splits(spec))}")
    return FolderSource(spec, path, split)


class Digits(Source):
    """scikit-learn's bundled handwritten digits: 1,797 real 8×8 grey images, as RGB PNG files.

    Args:
        split: `train`, or `val` for every sixth image of each class.
    """

    def __init__(self, split: str) -> None:
        if split not in ("train", "val"):
            raise UserError(f"no split {split!r}", where="digits", fix="it has: train, val")
        from sklearn.datasets import load_digits

        super().__init__("digits", [str(digit) for digit in range(10)], by_class=False)
        data = load_digits()
        # pixels count 0…16 in 8×8 blocks of a binary scan
        self._images = np.rint(data.images * (255 / 16)).astype(np.uint8)
        self._labels = data.target.astype(np.int64)
        held_out = np.zeros(len(self._labels), dtype=bool)
        for digit in range(10):
            held_out[np.flatnonzero(self._labels == digit)[HOLD_OUT - 1 :: HOLD_OUT]] = True
        self._chosen = np.flatnonzero(held_out if split == "val" else ~held_out)

    def __len__(self) -> int:
        return len(self._chosen)

    def item(self, i: int) -> SourceItem:
        """The i-th digit; its key carries the number in scikit-learn's order."""
        number = int(self._chosen[i])
        pixels = np.repeat(self._images[number][:, :, None], 3, axis=2)
        return SourceItem(f"digit-{number:04d}", int(self._labels[number]), lambda: encode(pixels, "png"))


class Tars(Source):
    """WebDataset tars: an image and a `.cls` or `.json` label per sample, or where no sample has one a `.txt` caption.

    Args:
        spec: what the user wrote.
        tars: local files.
        classes: known class names; empty: the numbers found in the labels.
    """

    def __init__(self, spec: str, tars: list[Path], classes: list[str]) -> None:
        self._tars = tars
        self._samples: list[tuple[Path, TarSample, str]] = []
        for tar in tars:
            self._add(tar)
        if not classes:
            numbers = [label for _, sample, _ in self._samples if (label := parse_label(sample.label, [])) is not None]
            classes = [str(number) for number in range(max(numbers, default=-1) + 1)]
        super().__init__(spec, classes, by_class=False)

    def _add(self, tar: Path) -> None:
        try:
            members, truncated = scan(tar), ""
        except TarTruncatedError as error:
            members, truncated = error.members, error.what
        self._samples.extend((tar, sample, "") for sample in group(members, tar))
        if truncated:
            self._samples.append((tar, TarSample(tar.name), truncated))

    def __len__(self) -> int:
        return len(self._samples)

    def item(self, i: int) -> SourceItem:
        """The i-th sample in the order of the tars."""
        tar, sample, problem = self._samples[i]
        label = None if problem else parse_label(sample.label, self.classes)
        problem = problem or self._problem(sample, label)
        caption = None if sample.caption is None else (lambda: _read_member(tar, sample.caption))
        return SourceItem(sample.key, label, lambda: _read_member(tar, sample.image), problem, caption)

    def _problem(self, sample: TarSample, label: int | None) -> str:
        if sample.image is None:
            return "no image in the sample"
        if sample.label is None:
            captioned = sample.caption is not None and not self.classes
            return "" if captioned else "no label: the sample has no .cls and no label in .json"
        return f"unknown label {sample.label!r}" if label is None else ""


def _read_member(tar: Path, member: Member | None) -> bytes:
    if member is None:
        return b""
    try:
        with open(tar, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    except OSError as error:
        raise BadImageError(f"the tar member cannot be read ({error.strerror})") from error
