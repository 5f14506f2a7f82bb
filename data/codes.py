"""Code shards: the codes of a whole data set as memory-mapped arrays, bound to the tokenizer that made them.

Shapes: `n` images of a shard, `A` views (crops) per image, `T` tokens per image, `B` samples asked for; `P` slots and `W + 1`
columns of a text.
The layout is a plain mapping (`TokenLayout.to_dict()`): this package knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .files import make_folder, os_errors, read_json, remove_leftovers, whole_file, write_json
from .randoms import hashes

CODES_FORMAT = 1
MANIFEST_NAME, SETTINGS_NAME = "manifest.json", "settings.json"
_ENCODE = "run tokar encode again"


class ShardRange(NamedTuple):
    """One shard of codes and the images it covers, `start … stop-1`."""

    shard: int
    start: int
    stop: int


class CodeWriter:
    """Writes the codes of `count` images, shard by shard, by any number of processes, resumable.

    Args:
        folder: of one split; created.
        layout: the tokenizer's, as plain values.
        tokenizer_hash: of its weights.
        views: A, crops per image.
        protocol: how the views were cut, plain values (e.g. `{"crop": "ten", "size": 256, "ratio": 1.1}`).
        count: images in all.
        classes: class names.
        shard_size: images per shard.
        text: what made the features of captions that lie beside the codes, plain values with `tokens` P and `features` W.

    Raises:
        UserError: the folder holds codes with other settings, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Mapping[str, Any],
        tokenizer_hash: str,
        views: int,
        protocol: Mapping[str, Any],
        *,
        count: int,
        classes: Sequence[str],
        shard_size: int = 10_000,
        text: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = _plain(
            {
                "format": CODES_FORMAT,
                "layout": dict(layout),
                "tokenizer_hash": tokenizer_hash,
                "views": views,
                "protocol": dict(protocol),
                "count": count,
                "classes": list(classes),
                "shard_size": shard_size,
                **({"text": dict(text)} if text else {}),
            }
        )
        self._limits = _limits(self.settings["layout"])
        self._type = code_type(self.settings["layout"])
        self._open()

    def _open(self) -> None:
        make_folder(self.folder)
        path = self.folder / SETTINGS_NAME
        if path.exists():
            before = read_json(path, "delete the folder and encode again")
            if found := differences(before, self.settings):
                other = found[0] if "tokenizer_hash:" not in found[0] else "by another tokenizer"
                what = f"the folder holds codes made otherwise ({other})"
                raise UserError(what, where=self.folder, fix="choose another folder or delete this one")
        else:
            write_json(path, self.settings)

    def pending(self, rank: int = 0, world: int = 1) -> list[ShardRange]:
        """The unfinished shards of one process; each process has a contiguous range of all shards.

        Call it on every process before any of them writes, so that all see the same state.
        """
        count, size = self.settings["count"], self.settings["shard_size"]
        ranges = [ShardRange(i, start, min(start + size, count)) for i, start in enumerate(range(0, count, size))]
        share = np.array_split(np.arange(len(ranges)), world)[rank].tolist()
        return [ranges[i] for i in share if not self._finished(ranges[i])]

    def write(
        self, shard: int, codes: np.ndarray, labels: np.ndarray, keys: Sequence[str], text: np.ndarray | None = None
    ) -> None:
        """Write one shard; its JSON file, written last, marks it as finished.

        Args:
            shard: number from `pending`.
            codes: `[n, A, T]` integers in the order of the layout.
            labels: `[n]` class indices.
            keys: n sample keys.
            text: `[n, P, W + 1]` features of the captions; kept in half precision.

        Raises:
            UserError: wrong shape, a code outside its vocabulary, a full disk.
        """
        start = shard * self.settings["shard_size"]
        n = min(start + self.settings["shard_size"], self.settings["count"]) - start
        wanted = (n, self.settings["views"], len(self._limits))
        if codes.shape != wanted or len(labels) != n or len(keys) != n:
            what = f"shard {shard} needs codes {wanted}, got {codes.shape}, {len(labels)} labels, {len(keys)} keys"
            raise UserError(what, where=self.folder, fix="encode with the layout that was declared")
        if codes.min() < 0 or (codes >= self._limits).any():
            raise UserError(
                f"shard {shard} has codes outside the vocabulary", where=self.folder, fix="check the tokenizer's layout"
            )
        arrays = {
            **self._text_array(text, n),
            "codes": codes.astype(self._type),
            "labels": np.asarray(labels, dtype=np.int64),
            "keys": np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_),
        }
        for name, array in arrays.items():
            path = _path(self.folder, shard, name)
            with os_errors(path), whole_file(path) as file:
                np.save(file, array)
        sizes = {name: _path(self.folder, shard, name).stat().st_size for name in arrays}
        write_json(_done_path(self.folder, shard), {"count": n, "bytes": sizes})

    def _text_array(self, text: np.ndarray | None, n: int) -> dict[str, np.ndarray]:
        declared = self.settings.get("text")
        if declared is None and text is None:
            return {}
        wanted = (n, declared["tokens"], declared["features"] + 1) if declared else None
        found = None if text is None else text.shape
        if text is None or found != wanted:
            raise UserError(f"text {found}, declared {wanted}", where=self.folder, fix="write the text that was declared")
        return {"text": text.astype(np.float16)}

    def finish(self) -> dict[str, Any]:
        """Write the manifest when all shards are there; call it on one process after all have written.

        Raises:
            UserError: shards are missing.
        """
        if missing := self.pending():
            what = f"{len(missing)} shards are not written yet, the first is {missing[0].shard}"
            raise UserError(what, where=self.folder, fix=_ENCODE)
        remove_leftovers(self.folder)
        shards = -(-self.settings["count"] // self.settings["shard_size"])
        entries = [read_json(_done_path(self.folder, shard), _ENCODE) for shard in range(shards)]
        manifest = {**self.settings, "shards": entries}
        write_json(self.folder / MANIFEST_NAME, manifest)
        return manifest

    def _finished(self, part: ShardRange) -> bool:
        path = _done_path(self.folder, part.shard)
        if not path.exists():
            return False
        sizes = read_json(path, f"delete it and {_ENCODE}")["bytes"]
        return not _wrong_files(self.folder, part.shard, sizes)


class CodeDataset:
    """Codes by number, for the stream.

    Args:
        folder: of one split, as `CodeWriter` finished it.
        expected_layout: of the tokenizer in use; `None`: any.
        expected_hash: of its weights; `None`: any.

    Raises:
        UserError: not finished, missing or truncated shard, another tokenizer or layout.
    """

    def __init__(
        self, folder: str | Path, expected_layout: Mapping[str, Any] | None = None, expected_hash: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / MANIFEST_NAME, "run tokar encode first, or again if it was interrupted")
        self._check_tokenizer(expected_layout, expected_hash)
        self._check_shards()
        self.layout: dict[str, Any] = self.manifest["layout"]
        self.views: int = self.manifest["views"]
        self.classes: list[str] = self.manifest["classes"]
        self.text: dict[str, Any] | None = self.manifest.get("text")
        self._limits = _limits(self.layout)
        self._shards = range(len(self.manifest["shards"]))
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._first = np.cumsum([0, *(entry["count"] for entry in self.manifest["shards"])])
        self.labels: np.ndarray = np.concatenate([_load(_path(self.folder, shard, "labels")) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._first[-1])

    def key(self, i: int) -> str:
        """The sample key of image `i`."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        keys = _load(_path(self.folder, shard, "keys"))
        return bytes(keys[i - self._first[shard]]).decode("utf-8", "surrogateescape")

    def fetch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """A batch for the stream: `codes` int64 `[B, T]` of one view each, `label` int64 `[B]`, perhaps `text` `[B, P, W + 1]`.

        The view of a sample is a pure function of (seed, epoch, number).

        Raises:
            UserError: a code outside its vocabulary: the shard is damaged.
        """
        views = (hashes(seed, epochs, indices, 1)[:, 0] % np.uint64(self.views)).astype(np.int64)
        codes = self.read(indices, views)
        if (codes >= self._limits).any():
            what = "codes outside the vocabulary: the shards are damaged"
            raise UserError(what, where=self.folder, fix=f"delete the folder and {_ENCODE}")
        text = {"text": self._gather("text", indices)} if self.text else {}
        return {"codes": codes, "label": self.labels[indices], **text}

    def read(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Codes int64 `[B, T]` of given images `[B]` in given views `[B]`."""
        return self._gather("codes", indices, views).astype(np.int64)

    def _gather(self, name: str, indices: np.ndarray, *views: np.ndarray) -> np.ndarray:
        """Rows of the arrays called `name`, of given images, and of given views where there are some."""
        shards = np.searchsorted(self._first, indices, side="right") - 1
        first = self._map(name, 0)
        rows = np.empty((len(indices), *first.shape[1 + len(views) :]), dtype=first.dtype)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            places = (indices[chosen] - self._first[shard], *(view[chosen] for view in views))
            rows[chosen] = self._map(name, shard)[places]
        return rows

    def _map(self, name: str, shard: int) -> np.ndarray:
        if (name, shard) not in self._maps:
            self._maps[name, shard] = _load(_path(self.folder, shard, name))
        return self._maps[name, shard]

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would carry the whole file to a spawned worker
        return {**self.__dict__, "_maps": {}}

    def _check_tokenizer(self, layout: Mapping[str, Any] | None, weights: str | None) -> None:
        if self.manifest.get("format") != CODES_FORMAT or not {"layout", "tokenizer_hash", "shards"} <= self.manifest.keys():
            raise UserError(f"not code shards of format {CODES_FORMAT}", where=self.folder, fix=_ENCODE)
        if layout is not None and (found := differences(self.manifest["layout"], _plain(dict(layout)))):
            what = f"the codes have another layout than the tokenizer ({'; '.join(found[:3])})"
            raise UserError(what, where=self.folder, fix="encode with this tokenizer or configure the one that made them")
        if weights is not None and self.manifest["tokenizer_hash"] != weights:
            what = (
                f"the codes were made by another tokenizer ({self.manifest['tokenizer_hash'][:12]}…, in use: {weights[:12]}…)"
            )
            raise UserError(what, where=self.folder, fix="encode with this tokenizer or configure the one that made them")

    def _check_shards(self) -> None:
        for shard, entry in enumerate(self.manifest["shards"]):
            if wrong := _wrong_files(self.folder, shard, entry["bytes"]):
                raise UserError("the shard is missing or truncated", where=wrong[0], fix=_ENCODE)


def code_type(layout: Mapping[str, Any]) -> type[np.uint16] | type[np.uint32]:
    """The integer that holds every code of a layout."""
    return np.uint16 if max(stream["vocab_size"] for stream in layout["streams"]) <= 65536 else np.uint32


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two plain mappings differ, one clause each, with dotted names."""
    found = []
    for name in [*here, *(name for name in there if name not in here)]:
        mine, theirs, dotted = here.get(name), there.get(name), f"{prefix}{name}"
        if isinstance(mine, list) and isinstance(theirs, list) and mine and isinstance(mine[0], dict):
            if len(mine) != len(theirs):
                found.append(f"{dotted}: {len(theirs)} there, {len(mine)} here")
            mine, theirs = (dict(enumerate(part)) for part in (mine, theirs)) if len(mine) == len(theirs) else ({}, {})
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(theirs, mine, f"{dotted}.")
        elif mine != theirs:
            found.append(f"{dotted}: {theirs} there, {mine} here")
    return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(values))


def _limits(layout: Mapping[str, Any]) -> np.ndarray:
    """`[T]` vocabulary size at each token."""
    streams = layout["streams"]
    return np.repeat([stream["vocab_size"] for stream in streams], [stream["n_tokens"] for stream in streams])


def _path(folder: Path, shard: int, name: str) -> Path:
    return folder / f"{name}-{shard:06d}.npy"


def _load(path: Path) -> np.ndarray:
    """An array on disk, mapped into memory.

    Raises:
        UserError: its header is damaged.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError("the shard is damaged", where=path, fix=f"delete it and {_ENCODE}") from error
    return array


def _done_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.json"


def _wrong_files(folder: Path, shard: int, sizes: Mapping[str, int]) -> list[Path]:
    paths = {_path(folder, shard, name): size for name, size in sizes.items()}
    return [path for path, size in paths.items() if not path.exists() or path.stat().st_size != size]
