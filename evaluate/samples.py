"""Images from a generator, in batches of any size.

Shapes: `N` samples, `B` of one batch, `T` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.stream import to_uint8
from ..errors import UserError
from ..models.distill.codebook import decode_vectors
from ..models.generators.base import Generator
from ..models.open import OpenedGenerator
from ..models.samplers.decode import Tally, sample
from ..models.text import TextEncoder
from ..models.tokenizers.base import Tokenizer
from .ranks import Source
from .speed import Speed, clocked

Draw = Callable[[np.ndarray, Tally], Iterator[dict[str, Tensor]]]
"""Gives the codes or vectors of some numbers as one batch, and counts what they cost."""


def class_ids(count: int, classes: list[int] | None, num_classes: int) -> Tensor:
    """The classes of `count` samples `[count]`: those in `classes`, or all of them, in turn.

    Raises:
        UserError: a class that the generator does not know.
    """
    chosen = classes or list(range(num_classes))
    unknown = [number for number in chosen if number >= num_classes]
    if unknown:
        raise UserError(f"no class {unknown[0]}", where="classes", fix=f"classes are 0 to {num_classes - 1}")
    return torch.tensor([chosen[index % len(chosen)] for index in range(count)])


@dataclass(frozen=True)
class Texts:
    """Texts as conditions: encoded when a part is asked for, since the features of many fill a memory."""

    encoder: TextEncoder
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.encoder(self.texts[rows])

    def only(self, numbers: np.ndarray) -> Texts:
        """The texts of these numbers."""
        return Texts(self.encoder, [self.texts[number] for number in numbers])


def text_encoder(opened: OpenedGenerator, place: str | None, device: torch.device) -> TextEncoder:
    """What makes the conditions of a generator of texts.

    Args:
        opened: the generator.
        place: of the encoder; `None`: where it lay when the captions were encoded.
        device: where it runs.

    Raises:
        UserError: its place is not known, or it gives other features than the generator reads.
    """
    reads = opened.generator.text
    assert reads is not None
    place = place or (opened.facts.get("text") or {}).get("path")
    if place is None:
        raise UserError("it does not say what encoded its captions", where="text_encoder", fix="give a folder or a hub id")
    encoder = TextEncoder(place, reads.tokens).to(device)
    reads.check_shape(encoder.tokens, encoder.features)
    return encoder


def with_texts(batches: Iterator[dict[str, Tensor]], texts: Texts) -> Iterator[dict[str, Tensor]]:
    """Adds `text` `[B, P, W + 1]` to batches of any size, in order."""
    start = 0
    for batch in batches:
        stop = start + len(batch["label"])
        yield {**batch, "text": texts[start:stop]}
        start = stop


@torch.inference_mode()
def draw_codes(
    generator: Generator,
    conditions: Tensor | Texts,
    *,
    seed: int,
    sampling: Mapping[str, Any],
    batch_size: int,
    numbers: np.ndarray | None = None,
    on_batch: Callable[[int], None] | None = None,
    tally: Tally | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Codes `[B, T]`, and of classes `label` `[B]`, on the CPU, for conditions `[N, …]` in order.

    Sample i depends on (seed, i) and its condition alone; `numbers` says which i these are, else 0, 1, ….
    """
    device = next(generator.parameters()).device
    numbers = np.arange(len(conditions)) if numbers is None else numbers
    for start in range(0, len(conditions), batch_size):
        part = conditions[start : start + batch_size]
        ids = torch.from_numpy(numbers[start : start + len(part)])
        codes = sample(generator, part.to(device), seed=seed, sample_ids=ids, tally=tally, **sampling)
        if on_batch is not None:
            on_batch(len(part))
        yield {"codes": codes.cpu(), **({"label": part} if part.ndim == 1 else {})}


@torch.inference_mode()
def decode_batches(
    tokenizer: Tokenizer, batches: Iterator[dict[str, Tensor]] | list[dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Adds `image` uint8 `[B, H, W, 3]` to batches of codes, or of vectors in their place."""
    device = next(tokenizer.parameters()).device
    for batch in batches:
        if "vectors" in batch:
            images = decode_vectors(tokenizer, batch["vectors"].to(device))
        else:
            images = tokenizer.decode(batch["codes"].to(device))
        yield {**batch, "image": to_uint8(images).cpu()}


def drawn(tokenizer: Tokenizer, draw: Draw, speed: Speed) -> Source:
    """Samples as a source of images by number.

    Args:
        tokenizer: decodes them.
        draw: see there.
        speed: is told how long that takes.
    """

    def source(batches: Sequence[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        for numbers in batches:
            tally = Tally()
            codes = list(clocked(draw(numbers, tally), speed.drawing, speed.device))
            for batch in clocked(decode_batches(tokenizer, codes), speed.decoding, speed.device):
                yield {**batch, **{name: torch.full((len(numbers),), cost) for name, cost in tally.per_image.items()}}

    return source
