"""What `tokar sample` draws on: other scales than trained on, and an image of which a part stays (in- and out-painting).

Shapes: `N` tokens of an image, `H`, `W` its pixels. VAR's zero-shot editing: the image is encoded, the codes of the part that
stays are fixed on every scale, the others are drawn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..conf.schema import Sample
from ..data.files import os_errors
from ..data.images import decode
from ..data.stream import to_image
from ..errors import UserError
from ..models.generators.flexvar import FlexVAR
from ..models.open import OpenedGenerator
from ..models.tokenizers.layout import TokenLayout

KEPT = 0.5
"""A token stays where at least this share of its cell stays: so the token of a 1x1 scale follows the larger part."""


def canvas(config: Sample, opened: OpenedGenerator, device: torch.device) -> tuple[OpenedGenerator, Tensor | None]:
    """The generator over the scales asked for, and the codes given `[1, N]`, -1 where one is to be drawn; `None`: all are.

    Raises:
        UserError: the generator has no scales to change, an image is missing or has no region, tokens have no place.
    """
    if config.scales is not None:
        opened = over(opened, config.scales)
    if config.given is None:
        if config.keep or config.mask:
            raise UserError("says what stays of no image", where="mask" if config.mask else "keep", fix="give given=IMAGE")
        return opened, None
    if bool(config.keep) == bool(config.mask):
        raise UserError("needs one of keep and mask", where="given", fix="give keep=top (a half that stays), or mask=IMAGE")
    layout = opened.tokenizer.layout
    stays = half(config.keep, layout.image_size) if config.keep else _mask(Path(str(config.mask)), layout.image_size)
    fixed = kept_tokens(layout, stays).to(device)
    pixels = torch.from_numpy(read_image(Path(config.given), layout.image_size))[None].to(device)
    with torch.inference_mode():
        codes = opened.tokenizer.encode(to_image(pixels)).codes.long()
    return opened, torch.where(fixed, codes, -1)


def over(opened: OpenedGenerator, scales: list[int | list[int]]) -> OpenedGenerator:
    """The same generator over other scales.

    Raises:
        UserError: only FlexVAR can, or the scales are no list that ends with the finest.
    """
    generator = opened.generator
    if not isinstance(generator, FlexVAR):
        raise UserError(
            f"a {type(generator).__name__} draws the scales it was trained on", where="scales", fix="leave scales out"
        )
    grids = [(scale, scale) if isinstance(scale, int) else (scale[0], scale[-1]) for scale in scales]
    try:
        view = generator.over(grids)
    except ValueError as error:
        raise UserError(str(error), where="scales") from error
    return replace(opened, generator=view, tokenizer=view.tokenizer)


def half(name: str, size: tuple[int, int]) -> Tensor:
    """What stays, bool `[H, W]`: a half, or the middle half of both sides (`center`), or all but that (`border`)."""
    height, width = size
    stays = torch.zeros(size, dtype=torch.bool)
    match name:
        case "top":
            stays[: height // 2] = True
        case "bottom":
            stays[height // 2 :] = True
        case "left":
            stays[:, : width // 2] = True
        case "right":
            stays[:, width // 2 :] = True
        case _:
            stays[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return ~stays if name == "border" else stays


def kept_tokens(layout: TokenLayout, stays: Tensor) -> Tensor:
    """Which tokens stay, bool `[1, N]`, of an image of which `stays [H, W]` does.

    Raises:
        UserError: tokens of this layout have no place in the image.
    """
    shares = []
    for stream in layout.streams:
        if stream.grid is None:
            raise UserError(
                f"tokens of the stream {stream.name} have no place in the image", where="given", fix="take a tokenizer of grids"
            )
        shares.append(F.interpolate(stays[None, None].float(), stream.grid, mode="area").flatten())
    return torch.cat(shares)[None] >= KEPT


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Pixels `[H, W, 3]` uint8 of an image: resized to cover `size`, its middle.

    Raises:
        UserError: no readable image.
    """
    from PIL import Image, ImageOps

    with os_errors(path):
        pixels = decode(path.read_bytes())
    picture = ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture).copy()


def _mask(path: Path, size: tuple[int, int]) -> Tensor:
    """What stays: where the mask is dark."""
    return torch.from_numpy(read_image(path, size)).float().mean(-1) < 128
