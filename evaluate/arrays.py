"""What users give from Python, checked: arrays, pictures, classes to tensors, and networks over them in batches.

Shapes: `B` images, `H`, `W` their pixels, `N` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..models.tokenizers.layout import TokenLayout

Images = NDArray[np.uint8] | Tensor | Image.Image | Sequence[Image.Image]
"""uint8 `[B, H, W, 3]` of numpy or torch, or pictures of PIL, all of one size."""


def pixels_of(images: Images) -> Tensor:
    """uint8 `[B, H, W, 3]`.

    Raises:
        UserError: something else.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Sequence):
        if not all(isinstance(image, Image.Image) for image in images) or len({image.size for image in images}) != 1:
            raise UserError("not pictures of one size", where="images", fix="give pictures of PIL, resized alike, or an array")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    pixels = torch.as_tensor(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise UserError(
            f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}",
            where="images",
            fix="give uint8 [B, H, W, 3] with values 0 to 255, or pictures of PIL",
        )
    return pixels


def codes_of(codes: ArrayLike | Tensor, layout: TokenLayout, least: int = 0) -> Tensor:
    """int64 `[B, N]`, from `least` on.

    Raises:
        UserError: another shape, no integers, or a code out of range.
    """
    given = codes if isinstance(codes, Tensor) else torch.as_tensor(np.asarray(codes))
    if given.ndim != 2 or given.shape[1] != layout.total_tokens or given.is_floating_point():
        what = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
        raise UserError(what, where="codes", fix=f"give integers [B, {layout.total_tokens}]")
    for stream, part in zip(layout.streams, given.split([stream.n_tokens for stream in layout.streams], dim=1), strict=True):
        if part.numel() and not least <= int(part.min()) <= int(part.max()) < stream.vocab_size:
            wrong = int(part.min()) if int(part.min()) < least else int(part.max())
            raise UserError(
                f"code {wrong}", where="codes", fix=f"those of {stream.name} are {least} to {stream.vocab_size - 1}"
            )
    return given.long()


def class_ids_of(asked: Any, num_classes: int) -> Tensor:
    """int64 `[B]`.

    Raises:
        UserError: no integers, or no such class.
    """
    try:
        ids = torch.atleast_1d(asked if isinstance(asked, Tensor) else torch.as_tensor(np.asarray(asked)))
    except TypeError as error:  # words
        raise UserError("this model draws classes, not texts", where="class_ids", fix="give their numbers") from error
    if ids.ndim != 1 or ids.is_floating_point():
        raise UserError(f"numbers of the shape {list(ids.shape)}", where="class_ids", fix="give integers [B]")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_classes:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise UserError(f"no class {wrong}", where="class_ids", fix=f"classes are 0 to {num_classes - 1}")
    return ids.long()


@torch.inference_mode()
def in_batches(act: Callable[[Tensor], Tensor], rows: Tensor, size: int, device: torch.device) -> NDArray[Any]:
    """What `act` makes of `rows`, `size` at once on `device`, brought back."""
    return np.concatenate([act(part.to(device)).cpu().numpy() for part in rows.split(size)])
