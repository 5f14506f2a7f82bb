"""`tokar encode`: images to code shards, resumed shard by shard, by one process or by several."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conf.compose import Composed
from ..conf.schema import Encode
from ..data.captions import Captions
from ..data.codes import CodeWriter, ShardRange
from ..data.progress import progress_bar
from ..data.shards import ImageDataset, SampleTransform
from ..data.stream import to_image
from ..data.transforms import Augment, FlipPair, TenCrop
from ..errors import UserError
from ..evaluate.console import say
from ..models.build import weights_hash
from ..models.open import open_tokenizer
from ..models.text import TextEncoder
from ..models.tokenizers.base import Tokenizer
from .strategy import Workers


def encode(composed: Composed) -> int:
    """Write the codes of every split below `out`; shards that are there already are kept."""
    config: Encode = composed.typed
    workers = Workers(config.strategy)
    workers.launch()
    tokenizer = open_tokenizer(Path(config.model)).to(workers.device)
    size = config.data.image_size
    if tokenizer.layout.image_size != (size, size):
        height, width = tokenizer.layout.image_size
        raise UserError(
            f"the tokenizer describes images of {height}x{width}, not {size}x{size}",
            where="data.image_size",
            fix=f"set data.image_size={height}, or train a tokenizer on this size",
        )
    text = TextEncoder(config.text.path, config.text.tokens).to(workers.device) if config.text else None
    _, transform = _views(config)
    data = {
        split: ImageDataset(config.data.path, split, transform=transform, decoder=config.data.decoder)
        for split in config.splits
    }
    for images in data.values() if text is not None else ():
        Captions(images).read(0)  # a split that is missing, or has no captions, is said before anything is written
    for split, images in data.items():
        _encode_split(config, workers, tokenizer, text, split, images)
    return 0


def _encode_split(
    config: Encode, workers: Workers, tokenizer: Tokenizer, text: TextEncoder | None, split: str, images: ImageDataset
) -> None:
    views, _ = _views(config)
    protocol: dict[str, Any] = {
        "views": config.views,
        "size": config.data.image_size,
        "source": config.data.source,
        "tokenizer": config.model,
    }
    if config.views == "ten-crop":
        protocol["ratio"] = config.crop_ratio
    writer = CodeWriter(
        Path(config.out) / split, tokenizer.layout.to_dict(), weights_hash(tokenizer), views, protocol,
        count=len(images), classes=images.classes, shard_size=config.shard_size, text=text.facts if text else None,
    )  # fmt: skip
    pending = writer.pending(workers.rank, workers.world)
    workers.barrier()
    with progress_bar(None, sum(part.stop - part.start for part in pending), f"encoding {split}") as advance:
        for part in pending:
            codes = _encode_shard(images, part, tokenizer, views, config.batch_size, advance)
            keys = [images.key(i) for i in range(part.start, part.stop)]
            features = _encode_captions(images, part, text, config.batch_size) if text else None
            writer.write(part.shard, codes, images.labels[part.start : part.stop], keys, features)
    workers.barrier()
    if workers.rank == 0:
        writer.finish()
        say(f"{writer.folder}: codes of {len(images)} images, {views} views, {tokenizer.layout.total_tokens} tokens each")


def _views(config: Encode) -> tuple[int, SampleTransform]:
    """Views per image, and what cuts them."""
    size = config.data.image_size
    match config.views:
        case "ten-crop":
            return 10, TenCrop(size, config.crop_ratio)
        case "flip":
            return 2, FlipPair(size)
        case _:
            return 1, Augment(size)


@torch.inference_mode()
def _encode_shard(
    images: ImageDataset, part: ShardRange, tokenizer: Tokenizer, views: int, batch_size: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Codes `[n, views, N]` of the images of one shard."""
    codes = []
    for start in range(part.start, part.stop, max(1, batch_size // views)):
        indices = np.arange(start, min(start + max(1, batch_size // views), part.stop))
        pixels = images.fetch(indices, np.zeros_like(indices), 0)["image"]
        codes.append(_encode_batch(tokenizer, pixels).reshape(len(indices), views, -1))
        advance(len(indices))
    return np.concatenate(codes)


def _encode_captions(images: ImageDataset, part: ShardRange, text: TextEncoder, batch_size: int) -> np.ndarray:
    """Features `[n, P, W + 1]` of the captions of one shard, in half precision."""
    captions = Captions(images)
    features = []
    for start in range(part.start, part.stop, batch_size):
        texts = [captions.read(i) for i in range(start, min(start + batch_size, part.stop))]
        features.append(text(texts).half().cpu().numpy())
    return np.concatenate(features)


def _encode_batch(tokenizer: Tokenizer, pixels: np.ndarray) -> np.ndarray:
    device = next(tokenizer.parameters()).device
    flat = torch.from_numpy(pixels.reshape(math.prod(pixels.shape[:-3]), *pixels.shape[-3:]))
    codes: Tensor = tokenizer.encode(to_image(flat.to(device))).codes
    return codes.cpu().numpy()
