"""Images from a generator, in batches of any size.

Shapes: `N` samples, `B` of one batch, `T` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import pair_noise
from ..data.stream import to_uint8
from ..errors import UserError
from ..models.distill.codebook import codebook_of, decode_vectors, nearest
from ..models.distill.dd1 import generate
from ..models.generators.base import Generator
from ..models.open import OpenedStudent
from ..models.samplers.decode import Tally, sample
from ..models.tokenizers.base import Tokenizer


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


@torch.inference_mode()
def draw_codes(
    generator: Generator,
    conditions: Tensor,
    *,
    seed: int,
    sampling: Mapping[str, Any],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
    tally: Tally | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Codes `[B, T]`, and of classes `label` `[B]`, on the CPU, for conditions `[N, …]` in order.

    Sample i depends on (seed, i) and its condition alone.
    """
    device = next(generator.parameters()).device
    for start in range(0, len(conditions), batch_size):
        part = conditions[start : start + batch_size]
        ids = torch.arange(start, start + len(part))
        codes = sample(generator, part.to(device), seed=seed, sample_ids=ids, tally=tally, **sampling)
        if on_batch is not None:
            on_batch(len(part))
        yield {"codes": codes.cpu(), **({"label": part} if part.ndim == 1 else {})}


@torch.inference_mode()
def draw_vectors(
    opened: OpenedStudent,
    labels: Tensor,
    *,
    seed: int,
    steps: Sequence[int] | None,
    split: int | None,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
    tally: Tally | None = None,
) -> Iterator[dict[str, Tensor]]:
    """What a one-step student makes of `labels [N]`: `vectors [B, T, D]`, their nearest `codes [B, T]`, `label`, on the CPU.

    Sample i depends on (seed, i) and its class alone; the noise is that of pair i of the same seed.

    Args:
        opened: student and tokenizer, on one device.
        labels: `[N]`.
        seed: of the noise.
        steps: see `models.distill.dd1.generate`.
        split: see there.
        batch_size: samples at once.
        on_batch: told the number of samples after each batch.
        tally: is told what it cost.
    """
    device, student = next(opened.student.parameters()).device, opened.student
    codebook = codebook_of(opened.tokenizer)
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        numbers = pair_noise(seed, range(start, start + len(part)), opened.tokenizer.layout.to_dict())
        noise = torch.from_numpy(numbers).to(device)
        vectors = generate(student, codebook, part.to(device), noise, steps=steps, split=split, tally=tally)
        if on_batch is not None:
            on_batch(len(part))
        yield {"vectors": vectors.cpu(), "codes": nearest(vectors, codebook).cpu(), "label": part}


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
