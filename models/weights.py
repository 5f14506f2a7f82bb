"""Tensors on disk: one safetensors file, or several that hold a part each, as the ranks of a run wrote them.

`model.safetensors` holds everything. `model-00001-of-00004.safetensors` and so on hold parts: whole tensors under their
names, and runs of elements of a flattened tensor as `name@start`, whose full shapes are in the file's metadata. Readers
ask for a tensor, or for a run of its elements, and need not know which it is.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError

SHAPES = "shapes"
"""Key of a file's metadata: the full shapes of tensors of which it holds a part, as JSON."""
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in _TYPES.items()}
Kind = tuple[torch.Size, torch.dtype]
"""Shape and type of a tensor."""


def part_name(stem: str, part: int, parts: int) -> str:
    """Name of the file of part `part` (from 0) of `parts`."""
    return f"{stem}.safetensors" if parts == 1 else f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"


def save_weights(weights: Mapping[str, Tensor], path: Path, shapes: Mapping[str, torch.Size] | None = None) -> None:
    """Write tensors, no two of which share memory, as safetensors.

    Args:
        weights: by name; a run of elements of a larger tensor by `name@start`.
        path: the file.
        shapes: full shapes of the tensors of which there is only a run.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    metadata = {SHAPES: json.dumps({name: list(shape) for name, shape in shapes.items()})} if shapes else None
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path, metadata)
    except SafetensorError as error:  # it hides what the system said in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@dataclass(frozen=True)
class _Run:
    """Elements of a flattened tensor that one file holds."""

    path: Path
    key: str
    start: int
    count: int


class WeightFiles:
    """The tensors of a folder under one stem, whatever the number of files; opened when they are first asked for.

    Args:
        folder: where the files lie.
        stem: their name without part and ending: `model`, `ema`, `optim`.

    Raises:
        UserError: a file is missing, truncated or no safetensors.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        whole = folder / part_name(stem, 0, 1)
        parts = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        self.paths = parts if parts and not whole.exists() else [whole]
        self._open: dict[Path, Any] = {}
        expected = int(self.paths[0].stem.rpartition("-")[2]) if parts and not whole.exists() else 1
        if len(self.paths) != expected:
            fix = "copy the whole folder again"
            raise UserError(f"{expected - len(self.paths)} of {expected} parts are missing", where=folder / stem, fix=fix)

    @staticmethod
    def exist(folder: Path, stem: str) -> bool:
        """There are files of that stem."""
        return (folder / part_name(stem, 0, 1)).exists() or any(folder.glob(f"{stem}-*-of-*.safetensors"))

    @cached_property
    def _index(self) -> tuple[dict[str, list[_Run]], dict[str, Kind]]:
        runs: dict[str, list[_Run]] = {}
        kinds: dict[str, Kind] = {}
        for path in self.paths:
            file = self._file(path)
            split = json.loads((file.metadata() or {}).get(SHAPES, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                held = file.get_slice(key)
                own = torch.Size(held.get_shape())
                name, at, start = key.rpartition("@")
                name, first = (name, int(start)) if at and name in split else (key, 0)
                kinds[name] = (torch.Size(split[name]) if name != key else own, _TORCH[held.get_dtype()])
                runs.setdefault(name, []).append(_Run(path, key, first, own.numel()))
        return runs, kinds

    @property
    def kinds(self) -> dict[str, Kind]:
        """Full shape and type of every tensor."""
        return self._index[1]

    def read(self, name: str) -> Tensor:
        """One tensor, whole.

        Raises:
            UserError: parts of it are missing, or a file is broken.
        """
        runs, kinds = self._index
        if len(runs[name]) == 1 and runs[name][0].key == name:
            return self._guarded(runs[name][0].path, lambda file: file.get_tensor(name))
        return self.read_run(name, 0, kinds[name][0].numel()).view(kinds[name][0])

    def read_run(self, name: str, start: int, count: int) -> Tensor:
        """The elements `[start, start + count)` of a flattened tensor.

        Raises:
            UserError: some of them are missing, or a file is broken.
        """
        parts, reached = [], start
        for run in sorted(self._index[0][name], key=lambda run: run.start):
            first, last = max(start, run.start), min(start + count, run.start + run.count)
            if first < last and first == reached:
                parts.append(self._read_part(run, first - run.start, last - run.start))
                reached = last
        if reached != start + count:
            raise UserError(f"elements of {name} are missing", where=self.folder, fix="copy the whole folder again")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _read_part(self, run: _Run, first: int, last: int) -> Tensor:
        def part(file: Any) -> Tensor:
            held = file.get_slice(run.key)
            if len(held.get_shape()) == 1:
                return held[first:last]
            return file.get_tensor(run.key).reshape(-1)[first:last].clone()

        return self._guarded(run.path, part)

    def all(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.kinds}

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._guarded(path, lambda file: file, opening=True)
        return self._open[path]

    def _guarded(self, path: Path, act: Callable[[Any], Any], opening: bool = False) -> Any:
        try:
            return act(safe_open(path, "pt") if opening else self._file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot be read ({error})", where=path, fix="the file is missing or broken: export or copy it again"
            ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file by name.

    Raises:
        UserError: missing, truncated or not a safetensors file.
    """
    return WeightFiles(path.parent, path.name.removesuffix(".safetensors")).all()


def write_streamed(kinds: Mapping[str, Kind], read: Callable[[str], Tensor], path: Path) -> None:
    """Write one safetensors file, tensor after tensor: no more than one of them is in memory.

    Args:
        kinds: shape and type of every tensor, which the head of the file states before the first comes.
        read: gives a tensor.
        path: the file.
    """
    head: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in kinds.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        head[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for content in _bytes_of(kinds, read):
            file.write(content)


def _bytes_of(names: Mapping[str, Any], read: Callable[[str], Tensor]) -> Iterator[memoryview]:
    for name in names:
        yield read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data
