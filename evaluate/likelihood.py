"""How well a generator foretells codes it has not seen: cross-entropy per token, in all and by stream.

Shapes: `B` batch, `N` tokens, `V` codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..models.generators.base import Generator
from ..models.tokenizers.layout import TokenLayout


@torch.no_grad()
def code_likelihood(
    generator: Generator,
    layout: TokenLayout,
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Cross-entropy of codes given their class and the codes before them.

    Args:
        generator: in eval mode, on its own device.
        layout: of the codes.
        batches: mappings with `codes` `[B, N]` and `label` `[B]`.
        on_batch: told the number of images after each batch.

    Returns:
        `cross_entropy` (nats per token), `bits_per_token`, `bits_per_image`; for a layout of several streams also
        `cross_entropy/<stream>` of each.

    Raises:
        UserError: no codes came.
    """
    device = next(generator.parameters()).device
    total, count = torch.zeros(layout.total_tokens, dtype=torch.float64), 0
    for batch in batches:
        codes = batch["codes"].long().to(device)
        logits = generator.logits(codes, batch["label"].to(device)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
        total += losses.double().sum(0).cpu()
        count += len(codes)
        if on_batch:
            on_batch(len(codes))
    if not count:
        raise UserError("no codes to measure", fix="give a split that has some")
    return _numbers(total / count, layout)


def _numbers(per_token: Tensor, layout: TokenLayout) -> dict[str, float]:
    mean, bits = per_token.mean().item(), per_token.sum().item() / math.log(2)
    numbers = {"cross_entropy": mean, "bits_per_token": mean / math.log(2), "bits_per_image": bits}
    if len(layout.streams) > 1:
        parts = per_token.split([stream.n_tokens for stream in layout.streams])
        numbers |= {
            f"cross_entropy/{stream.name}": part.mean().item() for stream, part in zip(layout.streams, parts, strict=True)
        }
    return numbers
