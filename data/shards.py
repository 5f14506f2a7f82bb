"""Prepared (or third-party) image shards as a list with random access.

Shapes: `B` samples asked for, `H`, `W` pixels of a transformed sample. A batch holds uint8 RGB images.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from .files import read_json
from .images import BadImageError, Decoder, check_decoder, decode, decode_into
from .index import NO_LABEL, ShardIndex, open_index
from .randoms import uniforms
from .remote import local_tars, names_tars

MANIFEST_NAME, SETTINGS_NAME, MANIFEST_FORMAT = "manifest.json", "settings.json", 1
MAX_OPEN = 128
"""Tars kept open per process, far below the usual limit of 1,024 descriptors."""

_REPEAT = "run tokar data prepare again"


class SampleTransform(Protocol):
    """What turns decoded pixels into a sample (see transforms.py).

    Args:
        shape: of a sample, e.g. `(H, W, 3)`.
        draws: how many random numbers in [0, 1) a sample takes.
        direct: an image that already has `shape` passes through `crop` unchanged.
    """

    shape: tuple[int, ...]
    draws: int
    direct: bool

    def crop(self, pixels: np.ndarray, random: np.ndarray) -> np.ndarray:
        """`[h, w, 3]` uint8 and `[draws]` in [0, 1) to `shape`."""

    def finish(self, batch: np.ndarray, random: np.ndarray) -> None:
        """Change a batch `[B, *shape]` in place, given `[B, draws]`."""


class OpenFiles:
    """A bounded number of read-only file descriptors; `pread` shares no position, so a fork may use them too."""

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self.limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def descriptors(self, paths: Sequence[str]) -> list[int]:
        """An open descriptor for each path; at most `limit` paths, so that none is closed for another.

        Raises:
            UserError: a file is missing.
        """
        return [self._use(path) for path in paths]

    def _use(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(error.strerror or str(error), where=path, fix=_REPEAT) from error
        return self._open[path]

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self.limit,)


class ImageDataset:
    """Images in WebDataset tars, by number.

    It serves the stream with `len` and `fetch`, and everybody else with `read`, `key` and `labels`.

    Args:
        folder: what `prepare` wrote, or a folder of WebDataset tars, or a tar pattern or URL (fetched into the cache once).
        split: sub-folder to read; a folder of tars without sub-folders is taken as it is.
        transform: what `fetch` does to the pixels; `None`: the images must all have one size.
        decoder: `auto`, `simplejpeg` or `pil`.

    Raises:
        UserError: no shards, a missing or changed shard, a damaged manifest, an unknown label.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", *, transform: SampleTransform | None = None, decoder: Decoder = "auto"
    ) -> None:
        check_decoder(decoder)
        self.folder, self.split, self.decoder = str(folder), split, decoder
        self.manifest, tars = _find_shards(str(folder), split)
        self.classes: list[str] = list(self.manifest.get("classes", []))
        indices = [open_index(tar, self.classes, prepared=bool(self.manifest)) for tar in tars]
        self._check_counts(tars, indices)
        self.tars: list[str] = [str(tar) for tar in tars]
        self._offset = np.concatenate([index.offset for index in indices])
        self._size = np.concatenate([index.size for index in indices])
        self._keys = [index.key for index in indices]
        self._first = np.cumsum([0, *(len(index) for index in indices)])
        self.labels: np.ndarray = np.concatenate([index.label for index in indices])
        self._check_labels()
        self._files = OpenFiles()
        self.transform: SampleTransform = transform or AsTheyAre(self._one_size())

    def __len__(self) -> int:
        return len(self.labels)

    def with_transform(self, transform: SampleTransform) -> ImageDataset:
        """The same images with another transform; shares the indices."""
        other = copy.copy(self)
        other.transform, other._files = transform, OpenFiles()
        return other

    @property
    def stored_bytes(self) -> int:
        """Bytes of the image files."""
        return int(self._size.sum())

    def key(self, i: int) -> str:
        """The WebDataset key of image `i`."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._keys[shard][i - self._first[shard]].decode("utf-8", "surrogateescape")

    def tar(self, i: int) -> str:
        """The tar that image `i` lies in."""
        return self.tars[int(np.searchsorted(self._first, i, side="right")) - 1]

    def read(self, i: int) -> bytes:
        """The file of image `i`."""
        return self.read_many(np.array([i]))[0]

    def read_many(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The files of some images, in the order asked for."""
        indices = np.asarray(indices, dtype=np.int64)
        shards = np.searchsorted(self._first, indices, side="right") - 1
        found: list[bytes] = []
        for start in range(0, len(indices), MAX_OPEN):
            rows = slice(start, start + MAX_OPEN)
            found += self._read_rows(
                shards[rows].tolist(), self._offset[indices[rows]].tolist(), self._size[indices[rows]].tolist()
            )
        return found

    def _read_rows(self, shards: list[int], offsets: list[int], sizes: list[int]) -> list[bytes]:
        distinct = list(set(shards))
        opened = dict(zip(distinct, self._files.descriptors([self.tars[shard] for shard in distinct]), strict=True))
        found = list(map(os.pread, map(opened.__getitem__, shards), sizes, offsets))
        if (lengths := list(map(len, found))) != sizes:
            short = next(shard for shard, length, size in zip(shards, lengths, sizes, strict=True) if length != size)
            raise UserError("the shard is shorter than its index says", where=self.tars[short], fix=_REPEAT)
        return found

    def fetch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """A batch for the stream.

        Args:
            indices: `[B]` sample numbers.
            epochs: `[B]` the epoch in which each is seen; with `seed` it fixes the augmentation.
            seed: of the run.

        Returns:
            `image` uint8 `[B, *transform.shape]` and `label` int64 `[B]`.

        Raises:
            UserError: an image that cannot be decoded, with its shard and key.
        """
        transform = self.transform
        batch = np.empty((len(indices), *transform.shape), dtype=np.uint8)
        random = uniforms(seed, epochs, indices, transform.draws)
        for row, data in enumerate(self.read_many(indices)):
            if not (transform.direct and decode_into(data, batch[row], self.decoder)):
                batch[row] = self._sample(int(indices[row]), data, random[row])
        transform.finish(batch, random)
        return {"image": batch, "label": self.labels[indices]}

    def _sample(self, i: int, data: bytes, random: np.ndarray) -> np.ndarray:
        try:
            return self.transform.crop(decode(data, self.decoder), random)
        except BadImageError as error:
            # a prepared image was whole once
            mend = f"delete the shard and {_REPEAT}" if self.manifest else "prepare the data with on_bad=skip"
            fix = error.fix or mend
            raise UserError(error.what, where=f"{self.tar(i)}: {self.key(i)}", fix=fix) from error

    def _one_size(self) -> tuple[int, int]:
        size = self.manifest.get("image_size")
        if size is None:
            size = decode(self.read(0), self.decoder).shape[:2]
        return int(size[0]), int(size[1])

    def _check_counts(self, tars: list[Path], indices: list[ShardIndex]) -> None:
        for entry, tar, index in zip(self.manifest.get("shards", []), tars, indices, strict=False):
            if entry["count"] != len(index) or entry["bytes"] != tar.stat().st_size:
                raise UserError("the shard is not the one in the manifest", where=tar, fix=_REPEAT)
        if sum(map(len, indices)) == 0:
            raise UserError("no images in the shards", where=self.folder, fix=_REPEAT)

    def _check_labels(self) -> None:
        missing = self.labels == NO_LABEL
        if missing.any() and not missing.all():
            name = self.key(int(np.flatnonzero(missing)[0]))
            fix = "give all samples a .cls, or none"
            raise UserError(f"{int(missing.sum())} samples have no label, the first is {name!r}", where=self.folder, fix=fix)
        if not self.classes:
            self.classes = [str(label) for label in range(int(self.labels.max()) + 1)]


class AsTheyAre:
    """The transform that does nothing: all images must have one size.

    Args:
        size: height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape: tuple[int, ...] = (*size, 3)
        self.draws, self.direct = 0, True

    def crop(self, pixels: np.ndarray, random: np.ndarray) -> np.ndarray:
        """The pixels themselves, if they have the size."""
        if pixels.shape != self.shape:
            seen, wanted = ("×".join(map(str, shape[:2])) for shape in (pixels.shape, self.shape))
            raise BadImageError(f"the image is {seen}, others are {wanted}", fix="choose a crop, or prepare with a size")
        return pixels

    def finish(self, batch: np.ndarray, random: np.ndarray) -> None:
        """Nothing."""


def _find_shards(spec: str, split: str) -> tuple[dict[str, Any], list[Path]]:
    """The manifest (empty for third-party tars) and the tars in order."""
    if names_tars(spec):
        return {}, local_tars(spec)
    root = Path(spec)
    folder = root / split if (root / split).is_dir() else root
    if (folder / MANIFEST_NAME).exists():
        manifest = read_json(folder / MANIFEST_NAME, _REPEAT)
        if "layout" in manifest:
            raise UserError("codes, not images", where=folder, fix="give them as codes.path, and prepared images as data.path")
        if manifest.get("format") != MANIFEST_FORMAT or "shards" not in manifest:
            raise UserError(f"not a manifest of format {MANIFEST_FORMAT}", where=folder / MANIFEST_NAME, fix=_REPEAT)
        return manifest, [folder / entry["name"] for entry in manifest["shards"]]
    if (folder / SETTINGS_NAME).exists():
        raise UserError(
            "the preparation was interrupted", where=folder, fix="run the same tokar data prepare again to finish it"
        )
    if tars := sorted(folder.glob("*.tar")):
        return {}, tars
    if not root.is_dir():
        raise UserError("no such folder", where=spec, fix="run tokar data prepare first")
    ready = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}"))
    fix = f"it has: {', '.join(ready)}" if ready else "run tokar data prepare first"
    raise UserError(f"no shards for split {split!r}", where=spec, fix=fix)
