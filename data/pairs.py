"""Pairs of a distillation on disk: noise, and the codes that a teacher turns it into.

They are code shards of one view. The noise is a pure function of the seed and the pair's number, so it is made again when it
is read, not stored: it would be thirty times as large as the codes.
Shapes: `B` pairs, `T` tokens of an image, `D` code width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .codes import CodeDataset, differences
from .randoms import gaussian

HELD_OUT = 1 << 40
"""Number of the first pair of the held-out split: no training set reaches it, so that both can grow."""


def pair_noise(seed: int, numbers: Sequence[int] | np.ndarray, layout: Mapping[str, Any]) -> np.ndarray:
    """Noise `[B, T, D]` float32 of pairs, in units of the codebook.

    Args:
        seed: of the pairs.
        numbers: of the pairs `[B]`.
        layout: of the codes, as plain values.
    """
    streams = layout["streams"]
    return gaussian(seed, numbers, (sum(stream["n_tokens"] for stream in streams), streams[0]["embed_dim"]))


def noise_check(seed: int, layout: Mapping[str, Any]) -> str:
    """Digest of the noise of pair 0, rounded: written beside the codes, compared when they are read."""
    rounded = np.round(pair_noise(seed, [0], layout) * 1024).astype(np.int32)
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


class PairDataset(CodeDataset):
    """Pairs by number, for the stream.

    Args:
        folder: of one split, as `tokar distill pairs` finished it.
        expected_layout: of the tokenizer in use; `None`: any.
        expected_hash: of its weights; `None`: any.
        teacher: hash of the teacher's weights in use; `None`: any.
        sampling: its guidance and truncation in use; `None`: any.

    Raises:
        UserError: no pairs, not finished, damaged, or of another tokenizer, teacher or guidance.
    """

    def __init__(
        self,
        folder: str | Path,
        expected_layout: Mapping[str, Any] | None = None,
        expected_hash: str | None = None,
        *,
        teacher: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, expected_layout, expected_hash)
        found = self.manifest["protocol"].get("pairs")
        again = "run tokar distill pairs with this teacher, or give the one that made them"
        if found is None:
            raise UserError("holds codes of images, not pairs of noise and codes", where=folder, fix="run tokar distill pairs")
        if teacher is not None and found["teacher_hash"] != teacher:
            what = f"the pairs are of another teacher ({found['teacher_hash'][:12]}…, in use: {teacher[:12]}…)"
            raise UserError(what, where=folder, fix=again)
        if sampling is not None and (changed := differences(found["sampling"], dict(sampling))):
            raise UserError(f"the pairs were drawn otherwise ({changed[0]})", where=folder, fix=again)
        self.seed, self.first = int(found["seed"]), int(found["first"])
        if found["noise"] != noise_check(self.seed, self.layout):
            raise UserError(
                "the noise of these pairs comes out otherwise on this machine", where=folder, fix="make the pairs again here"
            )

    def fetch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """A batch for the stream: `codes` int64 `[B, T]`, `noise` float32 `[B, T, D]`, `label` int64 `[B]`.

        Raises:
            UserError: a code outside its vocabulary: the shard is damaged.
        """
        batch = super().fetch(indices, epochs, seed)
        return {**batch, "noise": pair_noise(self.seed, self.first + np.asarray(indices), self.layout)}


class PairNumbers:
    """Pairs whose codes are not there yet, by number, for the stream: their noise and class, from which a teacher makes them.

    Args:
        layout: of the codes, as plain values.
        classes: class names; pair i is of class i mod their number.
        seed: of the pairs.
        count: of them.
        held_out: numbers of the other split.
    """

    def __init__(self, layout: Mapping[str, Any], classes: Sequence[str], seed: int, count: int, held_out: bool) -> None:
        self.layout, self.classes, self.seed, self._count = dict(layout), list(classes), seed, count
        self.first = HELD_OUT if held_out else 0

    def __len__(self) -> int:
        return self._count

    def key(self, i: int) -> str:
        """The number of pair `i`."""
        return str(self.first + i)

    def fetch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """A batch for the stream: `noise` float32 `[B, T, D]`, `label` int64 `[B]`."""
        numbers = self.first + np.asarray(indices)
        return {"noise": pair_noise(self.seed, numbers, self.layout), "label": numbers % len(self.classes)}
