"""What a tokenizer does to fine detail and to text: crops of images and their reconstructions, side by side in the report.

The tasks follow VTBench (details, text); the text is drawn here, so that nothing need be downloaded. Which crops are taken
depends on the images alone, so tokenizers measured on the same images show the same crops.
Shapes: `M` images, `B` batch, `S` side of a crop. Images are uint8 `[M, H, W, 3]`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..models.tokenizers.base import Tokenizer
from .protocol import Result, write_whole
from .reconstruction import DATA_RANGE, PSNR_CAP, psnr

DETAILS = 6
LOOKED_AT = 512
"""Images among which the details are looked for, unless a count says otherwise."""
WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "sphinx", "of", "quartz", "judges", "1234567890")
FONT_SIZES = (8, 12, 16, 24)
INKS = (("white", "black"), ("midnightblue", "gold"))


def crop_side(image_size: tuple[int, int]) -> int:
    """Side of a crop: a quarter of the image, 16 pixels or more."""
    return min(*image_size, max(16, min(image_size) // 4))


def detail_energy(images: Tensor, side: int) -> Tensor:
    """Mean squared difference of neighbouring pixels in every window: `[M, H-S+1, W-S+1]` of images `[M, H, W, 3]`."""
    grey = images.double().mean(3)
    down, right = F.pad(grey.diff(dim=1), (0, 0, 0, 1)), F.pad(grey.diff(dim=2), (0, 1))
    return F.avg_pool2d((down**2 + right**2)[:, None], side, stride=1)[:, 0]


def busiest(images: Tensor, side: int, start: int = 0) -> list[tuple[float, int, int, int]]:
    """The window of most detail of each image: its energy, the image's number (from `start`), row and column."""
    energy = detail_energy(images, side)
    values, places = energy.flatten(1).max(1)
    return [
        (value, start + number, place // energy.shape[2], place % energy.shape[2])
        for number, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True))
    ]


def text_images(size: tuple[int, int]) -> Tensor:
    """Words in PIL's default font, one image for each pair of inks and each size that fits two lines: `[M, H, W, 3]`."""
    height, width = size
    pages = [_page(height, width, points, paper, ink) for points in FONT_SIZES if 2 * points <= height for paper, ink in INKS]
    if not pages:
        raise UserError(f"images of {height}x{width} pixels are too small for text", fix="measure a tokenizer of larger images")
    return torch.stack(pages)


def _page(height: int, width: int, points: int, paper: str, ink: str) -> Tensor:
    image = Image.new("RGB", (width, height), paper)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(points)
    x, y = 1, 1
    number = 0
    while y + points <= height:
        word = WORDS[number % len(WORDS)]
        draw.text((x, y), word, fill=ink, font=font)
        x += int(draw.textlength(word + " ", font=font))
        number += 1
        if x >= width - points:
            x, y = 1, y + round(1.25 * points)
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class Crop:
    """A crop and what became of it, uint8 `[S, S, 3]` each."""

    name: str
    original: Tensor
    reconstruction: Tensor


@dataclass(frozen=True)
class Crops:
    """A result with numbers `<crop>/psnr`, and the crops."""

    result: Result
    crops: list[Crop]

    def draw(self, path: Path) -> Path:
        """One PNG without gaps: originals above, reconstructions below, in the order of the result's `crops`."""
        rows = [torch.cat([getattr(crop, side) for crop in self.crops], 1) for side in ("original", "reconstruction")]
        buffer = io.BytesIO()
        Image.fromarray(torch.cat(rows).numpy()).save(buffer, format="PNG")
        write_whole(path, buffer.getvalue())
        return path


@torch.no_grad()
def evaluate_crops(
    tokenizer: Tokenizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    data: Mapping[str, Any] | None = None,
    subject: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Crops:
    """Reconstruct the images with the finest details, and images of text, and cut the same squares out of both.

    Args:
        tokenizer: in eval mode, on its own device.
        batches: mappings with `image` uint8 `[B, H, W, 3]`, among which details are looked for.
        data: names the images, for the protocol.
        subject: names the tokenizer.
        on_batch: told the number of images after each batch.

    Raises:
        UserError: no images, or images too small for text.
    """
    side = crop_side(tokenizer.layout.image_size)
    details, count = _details(batches, side, on_batch)
    texts = text_images(tokenizer.layout.image_size)
    places = [(f"detail {i}", image, y, x) for i, (image, y, x) in enumerate(details, 1)]
    places += [
        (f"text {i}", page, y, x) for i, (page, (_, _, y, x)) in enumerate(zip(texts, busiest(texts, side), strict=True), 1)
    ]
    crops = [_crop(tokenizer, name, image, y, x, side) for name, image, y, x in places]
    numbers = {f"{crop.name}/psnr": _psnr(crop) for crop in crops}
    means = {
        f"{kind}/psnr": float(np.mean([value for key, value in numbers.items() if key.startswith(f"{kind} ")]))
        for kind in ("detail", "text")
    }
    protocol = {
        "data": dict(data or {}),
        "count": count,
        "side": side,
        "crops": [crop.name for crop in crops],
        "detail": "the window of largest mean squared difference of neighbouring grey pixels, one of each image",
        "text": "words in PIL's default font, the window chosen alike",
        "pixels": hashlib.sha256(torch.stack([crop.original for crop in crops]).numpy().tobytes()).hexdigest()[:16],
        "reconstruction": "uint8 of the whole image, then cut",
        "psnr": f"of each crop, data range {DATA_RANGE:g}, capped at {PSNR_CAP:g} dB",
    }
    return Crops(Result("crops", means | numbers, protocol, dict(subject or {})), crops)


def _details(
    batches: Iterable[Mapping[str, Tensor]], side: int, on_batch: Callable[[int], None] | None
) -> tuple[list[tuple[Tensor, int, int]], int]:
    """Image, row and column of the busiest windows, the busiest first, and how many images were looked at."""
    found: list[tuple[float, int, int, int, Tensor]] = []
    count = 0
    for batch in batches:
        windows = busiest(batch["image"], side, count)
        found += [(*window, image) for window, image in zip(windows, batch["image"], strict=True)]
        found = sorted(found, key=lambda item: (-item[0], item[1]))[:DETAILS]
        count += len(windows)
        if on_batch:
            on_batch(len(windows))
    if not count:
        raise UserError("no images to look at", fix="give a split that has some")
    return [(image, y, x) for _, _, y, x, image in found], count


def _crop(tokenizer: Tokenizer, name: str, image: Tensor, y: int, x: int, side: int) -> Crop:
    device = next(tokenizer.parameters()).device
    written = to_uint8(tokenizer.decode(tokenizer.encode(to_image(image[None].to(device))).codes))[0].cpu()
    window = (slice(y, y + side), slice(x, x + side))
    return Crop(name, image[window], written[window])


def _psnr(crop: Crop) -> float:
    original, reconstruction = (pixels.permute(2, 0, 1)[None] for pixels in (crop.original, crop.reconstruction))
    return psnr(original, reconstruction).item()
