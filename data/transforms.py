"""What happens to an image between the file and the batch; random numbers come in from outside (see randoms.py).

Shapes: `h`, `w` pixels as decoded, `S` side of the sample, `B` batch, `A` views.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..ranges import PositiveInt
from .images import BadImageError, centre_crop, resize_shorter

MIN_CROP = 0.8
"""The random crop shows at least this part of the shorter side (LlamaGen, GigaTok: shorter side drawn in [S, S/0.8])."""


class Augment:
    """A crop to S×S and a random horizontal flip.

    Args:
        size: S, side of the sample in pixels.
        crop: `center` (ADM: shorter side to S, middle), `random` (ADM: shorter side drawn in [S, S/0.8], a random
            window), `none` (images must be S×S).
        flip: mirror half of the samples.
    """

    def __init__(self, size: PositiveInt, crop: Literal["center", "random", "none"] = "center", flip: bool = False) -> None:
        if crop not in ("center", "random", "none"):
            raise ValueError(f"unknown crop {crop!r}; choose center, random or none")
        self.size, self.mode, self.flip = size, crop, flip
        self.shape: tuple[int, ...] = (size, size, 3)
        self.direct = crop != "random"
        # always four, so that switching the flip off does not change the crops
        self.draws = 4

    def crop(self, pixels: np.ndarray, random: np.ndarray) -> np.ndarray:
        """`[h, w, 3]` to `[S, S, 3]`; `random` is side, top, left, flip."""
        if self.mode == "random":
            return random_crop(pixels, self.size, random)
        if self.mode == "center":
            return centre_crop(resize_shorter(pixels, self.size), self.size)
        if pixels.shape != self.shape:
            raise BadImageError(
                f"the image is {pixels.shape[0]}×{pixels.shape[1]}, not {self.size}×{self.size}",
                fix="choose crop=center, or the size of the images",
            )
        return pixels

    def finish(self, batch: np.ndarray, random: np.ndarray) -> None:
        """Mirror the samples whose last number is below one half."""
        if self.flip:
            chosen = random[:, 3] < 0.5
            batch[chosen] = batch[chosen, :, ::-1]


class TenCrop:
    """Ten views `[10, S, S, 3]` for code extraction, see `ten_crop`."""

    def __init__(self, size: PositiveInt, ratio: float = 1.1) -> None:
        self.size, self.ratio = size, ratio
        self.shape: tuple[int, ...] = (10, size, size, 3)
        self.draws, self.direct = 0, False

    def crop(self, pixels: np.ndarray, random: np.ndarray) -> np.ndarray:
        """`[h, w, 3]` to `[10, S, S, 3]`."""
        return ten_crop(pixels, self.size, self.ratio)

    def finish(self, batch: np.ndarray, random: np.ndarray) -> None:
        """Nothing."""


class FlipPair:
    """Two views `[2, S, S, 3]` for code extraction: the centre crop and its mirror image."""

    def __init__(self, size: PositiveInt) -> None:
        self.size = size
        self.shape: tuple[int, ...] = (2, size, size, 3)
        self.draws, self.direct = 0, False

    def crop(self, pixels: np.ndarray, random: np.ndarray) -> np.ndarray:
        """`[h, w, 3]` to `[2, S, S, 3]`."""
        return flip_pair(pixels, self.size)

    def finish(self, batch: np.ndarray, random: np.ndarray) -> None:
        """Nothing."""


def random_crop(pixels: np.ndarray, size: int, random: np.ndarray) -> np.ndarray:
    """ADM's random crop: shorter side drawn in [S, ⌈S/0.8⌉], box halving then bicubic, a random S×S window.

    Args:
        pixels: `[h, w, 3]` uint8.
        size: S.
        random: at least three numbers in [0, 1): side, top, left.
    """
    shorter = size + int(random[0] * (math.ceil(size / MIN_CROP) - size + 1))
    pixels = resize_shorter(pixels, shorter)
    top = int(random[1] * (pixels.shape[0] - size + 1))
    left = int(random[2] * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def ten_crop(pixels: np.ndarray, size: int, ratio: float = 1.1) -> np.ndarray:
    """Four corners and the middle of a slightly larger centre crop, then the same five of its mirror image.

    The protocol of LlamaGen and GigaTok: ADM centre crop to int(size·ratio), then torchvision's TenCrop order (top left,
    top right, bottom left, bottom right, middle; then those of the mirrored image).

    Args:
        pixels: `[h, w, 3]` uint8.
        size: S.
        ratio: of the intermediate crop to S, at least 1.

    Returns:
        `[10, S, S, 3]` uint8.
    """
    wide = int(size * ratio)
    base = centre_crop(resize_shorter(pixels, wide), wide)
    end, middle = wide - size, round((wide - size) / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    views = [image[y : y + size, x : x + size] for image in (base, base[:, ::-1]) for y, x in corners]
    return np.stack(views)


def flip_pair(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre crop and its mirror image, `[2, S, S, 3]` uint8."""
    base = centre_crop(resize_shorter(pixels, size), size)
    return np.stack([base, base[:, ::-1]])
