"""How well a generator foretells codes it has not seen: cross-entropy per token, in all and by stream.

Shapes: `B` batch, `N` tokens, `V` codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.stream import to_image
from ..errors import UserError
from ..models.build import weights_hash
from ..models.generators.base import Generator
from ..models.samplers.pick import uniforms
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.layout import TokenLayout
from .protocol import Result


@torch.no_grad()
def code_likelihood(
    generator: Generator,
    layout: TokenLayout,
    batches: Iterable[Mapping[str, Tensor]],
    on_batch: Callable[[int], None] | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Cross-entropy of codes given their class or text and the codes before them.

    Args:
        generator: in eval mode, on its own device.
        layout: of the codes.
        batches: mappings with `codes` `[B, N]` and `label` `[B]`, for a generator of texts with `text` `[B, P, W + 1]`.
        on_batch: told the number of images after each batch.
        draws: of the bound, at least 2, for a generator whose likelihood is not exact.
        seed: of the draws; those of image i depend on (seed, i) alone.

    Returns:
        `cross_entropy` (nats per token), `bits_per_token`, `bits_per_image`; of a bound also `bits_per_token_error` and
        `bits_per_image_error`, the standard errors that the draws leave; for a layout of several streams also
        `cross_entropy/<stream>` of each.

    Raises:
        UserError: no codes came.
    """
    device, known = next(generator.parameters()).device, "label" if generator.text is None else "text"
    total, variance, count = torch.zeros(layout.total_tokens, dtype=torch.float64), 0.0, 0
    for batch in batches:
        codes, condition = batch["codes"].long().to(device), batch[known].to(device)
        if generator.exact:
            nll = generator.token_nll(codes, condition)[None]
        else:
            noise = uniforms(seed, range(count, count + len(codes)), draws * generator.noise_size, device)
            nll = torch.stack([generator.token_nll(codes, condition, part) for part in noise.chunk(draws, dim=1)])
            variance += nll.double().sum(-1).var(0).sum().item() / draws  # of the mean over draws, summed over images
        total += nll.double().mean(0).sum(0).cpu()
        count += len(codes)
        if on_batch:
            on_batch(len(codes))
    if not count:
        raise UserError("no codes to measure", fix="give a split that has some")
    numbers = _numbers(total / count, layout)
    if not generator.exact:
        error = math.sqrt(variance) / count / math.log(2)
        numbers |= {"bits_per_token_error": error / layout.total_tokens, "bits_per_image_error": error}
    return numbers


def evaluate_likelihood(
    generator: Generator,
    tokenizer: Tokenizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    draws: int,
    seed: int,
    data: Mapping[str, Any],
    subject: Mapping[str, Any],
    on_batch: Callable[[int], None] | None = None,
) -> Result:
    """Bits of the codes of held-out images, given their class or caption.

    Args:
        generator: in eval mode.
        tokenizer: makes the codes.
        batches: mappings with `image` uint8 `[B, H, W, 3]` and `label` `[B]`, or `text` `[B, P, W + 1]`.
        draws: see `code_likelihood`; stated in the protocol whether the generator needs them or not.
        seed: see `code_likelihood`.
        data: names the images.
        subject: names the generator.
        on_batch: told the number of images after each batch.

    Raises:
        UserError: there are no images.
    """
    numbers = code_likelihood(generator, tokenizer.layout, _encoded(tokenizer, batches), on_batch, draws=draws, seed=seed)
    protocol = {
        "data": dict(data),
        "condition": "class" if generator.text is None else "caption",
        "tokenizer": weights_hash(tokenizer)[:16],
        "estimate": "exact where one pass gives it, else the mean bound over the draws",
        "draws": draws,
    }
    kind = "exact" if generator.exact else "upper bound"
    return Result("likelihood", numbers, protocol, {**subject, "likelihood": kind, "seed": seed})


@torch.no_grad()
def _encoded(tokenizer: Tokenizer, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    device = next(tokenizer.parameters()).device
    for batch in batches:
        yield {**batch, "codes": tokenizer.encode(to_image(batch["image"].to(device))).codes}


def _numbers(per_token: Tensor, layout: TokenLayout) -> dict[str, float]:
    mean, bits = per_token.mean().item(), per_token.sum().item() / math.log(2)
    numbers = {"cross_entropy": mean, "bits_per_token": mean / math.log(2), "bits_per_image": bits}
    if len(layout.streams) > 1:
        parts = per_token.split([stream.n_tokens for stream in layout.streams])
        numbers |= {
            f"cross_entropy/{stream.name}": part.mean().item() for stream, part in zip(layout.streams, parts, strict=True)
        }
    return numbers
