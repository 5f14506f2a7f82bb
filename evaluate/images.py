"""Images out of the program and back in: grids to look at, and the two forms that evaluators read (`.npz`, folder of PNGs).

Shapes: `N` images, `B` of one batch. Images are uint8 `[N, H, W, 3]`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..data.files import digest_of, os_errors, whole_file
from ..data.images import decode
from ..errors import UserError
from .protocol import file_hash, write_whole
from .report.pictures import ABOUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
LABELS_NAME = "labels.json"
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same samples give the same bytes


@dataclass(frozen=True)
class Picture:
    """Images to be set out as a grid, and what it tells of itself.

    Args:
        images: uint8 `[N, H, W, 3]`, row by row.
        columns: what stands above each column of the grid, in order; empty: about square.
        note: one sentence on it.
    """

    images: Tensor
    columns: Sequence[str] = ()
    note: str = ""

    def save(self, path: Path, scale: int = 1) -> Path:
        """Write it as one PNG, with its words in it."""
        about = {key: value for key, value in (("columns", list(self.columns)), ("note", self.note)) if value}
        return save_grid(self.images, path, len(self.columns) or None, scale, about)


def save_grid(
    images: Tensor, path: Path, columns: int | None = None, scale: int = 1, about: Mapping[str, Any] | None = None
) -> Path:
    """Write images as one PNG, row by row, with transparent gaps that suit a light and a dark page.

    Args:
        images: uint8 `[N, H, W, 3]`, at least one.
        path: of the PNG.
        columns: images per row; `None` makes the grid about square.
        scale: enlargement by whole pixels.
        about: what the picture tells of itself on the report page, kept in the PNG (see docs/formats.md).
    """
    tiles = images.cpu().numpy().repeat(scale, 1).repeat(scale, 2)
    count, height, width, _ = tiles.shape
    columns = min(columns or ceil(sqrt(count)), count)
    rows = ceil(count / columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        sheet[top : top + height, left : left + width, :3] = tile
        sheet[top : top + height, left : left + width, 3] = 255
    buffer, words = io.BytesIO(), PngInfo()
    if about:
        words.add_itxt(ABOUT, json.dumps(about, ensure_ascii=False))
    Image.fromarray(sheet).save(buffer, format="PNG", pnginfo=words)
    write_whole(path, buffer.getvalue())
    return path


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure of matplotlib as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
    return path


def save_npz(batches: Iterable[Mapping[str, Tensor]], path: Path, count: int) -> Path:
    """Write samples in the layout of the usual ImageNet evaluator: `arr_0` uint8 `[N, H, W, 3]`, `arr_1` int64 labels.

    Images are streamed into the file; the name appears when it is complete.

    Args:
        batches: mappings with `image` uint8 `[B, H, W, 3]` and, in all or none, `label` int64 `[B]`.
        path: of the `.npz`.
        count: number of images that will come; the array's header stands before them.

    Raises:
        UserError: another number of images came.
    """
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", ZIP_EPOCH), "w", force_zip64=True) as file:
                labels = _write_images(file, batches, count, path)
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy", ZIP_EPOCH), "w") as file:
                    np.lib.format.write_array(file, labels)
    return path


def _write_images(file: IO[bytes], batches: Iterable[Mapping[str, Tensor]], count: int, path: Path) -> NDArray[np.int64] | None:
    seen, labels = 0, []
    for batch in batches:
        images = np.ascontiguousarray(batch["image"].cpu().numpy())
        if not seen:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(images.tobytes())
        seen += len(images)
        if "label" in batch:
            labels.append(batch["label"].cpu().numpy().astype(np.int64))
    if seen != count:
        raise UserError(f"{seen} images came, {count} were announced", where=path, fix="sample again with the right count")
    return np.concatenate(labels) if labels else None


def save_folder(batches: Iterable[Mapping[str, Tensor]], folder: Path) -> Path:
    """Write samples as `000000.png`, `000001.png`, … and their labels, where there are some, as `labels.json`."""
    labels: dict[str, int] = {}
    index = 0
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for batch in batches:
            given = batch["label"].tolist() if "label" in batch else []
            for position, pixels in enumerate(batch["image"].cpu().numpy()):
                name = f"{index:06d}.png"
                Image.fromarray(pixels).save(folder / name)
                labels |= {name: given[position]} if given else {}
                index += 1
    if labels:
        write_whole(folder / LABELS_NAME, (json.dumps(labels) + "\n").encode())
    return folder


def count_samples(path: Path) -> int:
    """Number of images that `load_samples` will give.

    Raises:
        UserError: neither an `.npz` of images nor a folder with images.
    """
    if path.is_dir():
        return len(_image_files(path))
    with _open_npz(path) as archive, archive.open("arr_0.npy") as file:
        return _image_shape(file, path)[0]


def has_images(path: Path) -> bool:
    """Whether images can be read there: a folder, or an `.npz` with `arr_0`."""
    if path.is_dir():
        return True
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def load_samples(path: Path, batch_size: int = 64) -> Iterator[dict[str, Tensor]]:
    """All samples of an `.npz` or a folder of images, in batches; the last may be smaller. See `read_samples`."""
    count = count_samples(path)
    return read_samples(path, [np.arange(start, min(start + batch_size, count)) for start in range(0, count, batch_size)])


def read_samples(path: Path, batches: Iterable[NDArray[np.int64]]) -> Iterator[dict[str, Tensor]]:
    """Samples from an `.npz` or a folder of images, read as they are needed.

    Args:
        path: `.npz` with `arr_0` (labels in `arr_1`), or a folder of equally large images (and `labels.json`) in name order.
        batches: numbers of the images of each batch.

    Yields:
        `image` uint8 `[B, H, W, 3]` and, where labels exist, `label` int64 `[B]`.

    Raises:
        UserError: unreadable, of another layout, or images of several sizes.
    """
    return _from_folder(path, batches) if path.is_dir() else _from_npz(path, batches)


def content_hash(path: Path) -> str:
    """SHA-256 of an `.npz`, or of the names and contents of a folder's images.

    Raises:
        UserError: a file cannot be read.
    """
    if not path.is_dir():
        return file_hash(path)
    return digest_of({file.name: file_hash(file) for file in [*_image_files(path), *path.glob(LABELS_NAME)]})


def _open_npz(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError("no readable samples", where=path, fix="give an .npz with arr_0 or a folder of PNGs") from error
    if "arr_0.npy" not in archive.namelist():
        archive.close()
        raise UserError("has no array arr_0", where=path, fix="write uint8 images [N, H, W, 3] as the first array")
    return archive


def _image_shape(file: IO[bytes], path: Path) -> tuple[int, int, int, int]:
    """Read the header of an array, leaving the file at its first byte of data: a 50,000-image array need not fit in memory."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        raise UserError(f"arr_0 is {dtype} {shape}", where=path, fix="write uint8 images [N, H, W, 3]")
    return shape


def _from_npz(path: Path, batches: Iterable[NDArray[np.int64]]) -> Iterator[dict[str, Tensor]]:
    with _open_npz(path) as archive, archive.open("arr_0.npy") as file:
        count, height, width, _ = _image_shape(file, path)
        labels, first, size = _npz_labels(archive, count, path), file.tell(), height * width * 3
        for numbers in batches:
            content = bytearray()
            for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
                file.seek(first + int(run[0]) * size)
                content += _read_exactly(file, len(run) * size, path)
            pixels = np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)
            yield _batch(pixels, None if labels is None else labels[numbers])


def _npz_labels(archive: zipfile.ZipFile, count: int, path: Path) -> NDArray[np.int64] | None:
    if "arr_1.npy" not in archive.namelist():
        return None
    with archive.open("arr_1.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False)
    if labels.shape != (count,):
        raise UserError(
            f"arr_1 is {labels.shape}, not one label for each of {count} images", where=path, fix="write int labels [N]"
        )
    return labels.astype(np.int64)


def _read_exactly(file: IO[bytes], size: int, path: Path) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise UserError("ends before its last image", where=path, fix="the file is truncated: write it again")
    return content


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError("has no images", where=folder, fix="give a folder of .png files or an .npz")
    return files


def _from_folder(folder: Path, batches: Iterable[NDArray[np.int64]]) -> Iterator[dict[str, Tensor]]:
    files = _image_files(folder)
    labels = _folder_labels(folder, files)
    size: tuple[int, int] | None = None
    for numbers in batches:
        part = [files[number] for number in numbers]
        tiles = [_read_image(file) for file in part]
        for file, tile in zip(part, tiles, strict=True):
            size = size or tile.shape[:2]
            if tile.shape[:2] != size:
                raise UserError(f"is {tile.shape[:2]}, the ones before it {size}", where=file, fix="give images of one size")
        yield _batch(np.stack(tiles), None if labels is None else labels[numbers])


def _folder_labels(folder: Path, files: list[Path]) -> NDArray[np.int64] | None:
    path = folder / LABELS_NAME
    if not path.exists():
        return None
    try:
        named = json.loads(path.read_text())
        return np.array([named[file.name] for file in files], np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("does not give every image a label", where=path, fix="remove the file or write it again") from error


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        return decode(path.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(f"no readable image ({error})", where=path, fix="remove the file or write it again") from error


def _batch(pixels: NDArray[Any], labels: NDArray[np.int64] | None) -> dict[str, Tensor]:
    batch = {"image": torch.from_numpy(pixels)}
    if labels is not None:
        batch["label"] = torch.from_numpy(labels)
    return batch
