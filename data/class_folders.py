"""Folders and zips of class folders, `{class}/…` or `{split}/{class}/…`."""

from __future__ import annotations

import os
import zipfile
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .images import BadImageError
from .items import Source, SourceItem
from .tars import CAPTION_EXTENSION, IMAGE_EXTENSIONS

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "eval"})


class ClassFolders(Source):
    """Files named `{class}/…` or `{split}/{class}/…`; a `.txt` beside an image of the same name is its caption.

    Where every image has a caption and there are no folders, there are no classes.

    Args:
        names: all files, relative, with forward slashes.
        folders: all folders, relative.
    """

    def __init__(self, spec: str, names: Iterable[str], folders: Iterable[str], split: str) -> None:
        wrapper, names, folders = unwrap(names, folders)
        tops = top_folders(names, folders)
        splits = split_folders(tops, split)
        if splits and split not in splits:
            raise UserError(f"no split {split!r}", where=spec, fix=f"it has: {', '.join(splits)}")
        depth = 1 if splits else 0
        # over all splits, so that a class missing from one split does not shift the labels
        found = {parts[depth] for parts in (folder.split("/") for folder in folders) if len(parts) > depth}
        captions = _captions(names)
        if not found and not captions:
            raise UserError("no class folders", where=spec, fix="put the images of each class in a folder of its own")
        super().__init__(spec, sorted(found), by_class=True)
        root = f"{split}/" if splits else ""
        texts = set(captions.values())
        inside = [name for name in names if name.startswith(root) and name not in texts]
        # documents beside the class folders are not images; images there are, and lack a label
        files = [name for name in inside if "/" in name[len(root) :] or _extension(name) in IMAGE_EXTENSIONS]
        self._files, self._root = [wrapper + name for name in files], len(wrapper + root)
        self._captions = {wrapper + image: wrapper + text for image, text in captions.items()}
        self._labels = {name: label for label, name in enumerate(self.classes)}
        if len(self.classes) == 1 and not splits and tops[self.classes[0]] and not any(name.count("/") == 1 for name in names):
            what = f"all images lie deeper, in folders inside {self.classes[0]!r}: one class, or a wrapper around the classes?"
            raise UserError(what, where=spec, fix="put the class folders at the top")

    def __len__(self) -> int:
        return len(self._files)

    def item(self, i: int) -> SourceItem:
        """The i-th file in the order of class, then name."""
        name = self._files[i]
        inner = name[self._root :]
        folder, slash, base = inner.rpartition("/")
        # WebDataset ends a key at the first dot of the base name
        key = folder + slash + os.path.splitext(base)[0].replace(".", "_")
        text = self._captions.get(name)
        caption = None if text is None else (lambda: self._read(text))
        if not slash and (self.classes or caption is None):
            return SourceItem(key, None, lambda: b"", "no label: the image lies outside the class folders")
        label = self._labels[inner.split("/", 1)[0]] if slash else None
        return SourceItem(key, label, lambda: self._read(name), caption=caption)

    @abstractmethod
    def _read(self, name: str) -> bytes: ...


class FolderSource(ClassFolders):
    """A folder of class folders."""

    def __init__(self, spec: str, path: Path, split: str) -> None:
        self._path = path
        super().__init__(spec, *walk(path), split)

    def _read(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except OSError as error:
            raise BadImageError(f"the file cannot be read ({error.strerror})") from error


class ZipSource(ClassFolders):
    """A zip of class folders."""

    def __init__(self, spec: str, path: Path, split: str) -> None:
        self._path, self._opened = path, (0, None)
        super().__init__(spec, *zip_names(path), split)

    _opened: tuple[int, zipfile.ZipFile | None]

    def _read(self, name: str) -> bytes:
        # a ZipFile shares its file position with the process it was forked from
        if self._opened[0] != os.getpid() or self._opened[1] is None:
            self._opened = (os.getpid(), zipfile.ZipFile(self._path))
        archive = self._opened[1]
        assert archive is not None
        try:
            return archive.read(name)
        except Exception as error:  # zlib, CRC, passwords and unknown methods each raise their own
            raise BadImageError(f"the zip member cannot be read ({error})") from error


def unwrap(names: Iterable[str], folders: Iterable[str]) -> tuple[str, list[str], list[str]]:
    """Take off one folder that only wraps split folders, as archives often have: its prefix, and the sorted names inside."""
    names, folders = sorted(names), sorted(set(folders))
    tops = {folder.split("/", 1)[0] for folder in folders}
    inner = {folder.split("/")[1] for folder in folders if "/" in folder}
    if len(tops) != 1 or not tops.isdisjoint(SPLIT_NAMES) or not inner or not inner <= SPLIT_NAMES:
        return "", names, folders
    prefix = f"{tops.pop()}/"
    names, folders = ([name[len(prefix) :] for name in part if name.startswith(prefix)] for part in (names, folders))
    return prefix, names, folders


def walk(path: Path) -> tuple[list[str], list[str]]:
    """Relative names of all files and folders below a folder, hidden ones left out; links are followed."""
    names: list[str] = []
    folders: list[str] = []
    for folder, children, files in os.walk(path, followlinks=True):
        children[:] = sorted(child for child in children if not child.startswith("."))
        relative = os.path.relpath(folder, path).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        folders.extend(prefix + child for child in children)
        names.extend(prefix + file for file in files if not file.startswith("."))
    return names, folders


def zip_names(path: Path) -> tuple[list[str], list[str]]:
    """Names of all files and folders in a zip.

    Raises:
        UserError: it is not a zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [name for name in archive.namelist() if not name.startswith(("__MACOSX/", "/"))]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError("not a readable zip", where=path, fix="download or write it again") from error
    names = [name for name in entries if not name.endswith("/") and not name.rpartition("/")[2].startswith(".")]
    folders = {name.rstrip("/") for name in entries if name.endswith("/")}
    for name in names:
        parts = name.split("/")[:-1]
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return names, sorted(folders)


def top_folders(names: Iterable[str], folders: Iterable[str]) -> dict[str, bool]:
    """Top folders, each with whether it holds images two levels down."""
    tops = {folder.split("/", 1)[0]: False for folder in folders}
    for name in names:
        if name.count("/") >= 2:
            tops[name.split("/", 1)[0]] = True
    return tops


def split_folders(tops: dict[str, bool], asked: str = "") -> list[str]:
    """The top folders if they are splits and not classes: known names (or the one asked for) with class folders inside."""
    if any(tops.values()) and (tops.get(asked, False) or tops.keys() <= SPLIT_NAMES):
        return sorted(tops)
    return []


def _captions(names: list[str]) -> dict[str, str]:
    """The caption of each image that has one."""
    texts = {os.path.splitext(name)[0]: name for name in names if _extension(name) == CAPTION_EXTENSION}
    stems = {name: os.path.splitext(name)[0] for name in names if texts and _extension(name) in IMAGE_EXTENSIONS}
    return {image: texts[stem] for image, stem in stems.items() if stem in texts}


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()
