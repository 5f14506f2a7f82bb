"""Entropy losses: each assignment sure, all codes used; in pieces, and over all ranks.

Shapes: `R` rows: all positions of a batch, flattened; `D` code width, `V` codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ranks import mean_over_ranks
from .search import CHUNK

TEMPERATURE = 0.01  # of LlamaGen, Open-MAGVIT2, IBQ and BSQ alike
_LOG_GUARD = 1e-5


def entropy_loss(
    rows: Tensor, codes: Tensor, chunk: int | None = None, temperature: float = TEMPERATURE, diversity: float = 1.0
) -> Tensor:
    """`score_entropy_loss` of p = softmax(−|row − code|² / temperature).

    Args:
        rows: `[R, D]`; gradients reach both.
        codes: `[V, D]`.
        chunk, temperature, diversity: see there.
    """
    # |row|² is the same for all codes of a row: the softmax does not see it.
    return score_entropy_loss(rows, 2 / temperature * codes, codes.square().sum(-1) / -temperature, diversity, chunk)


def score_entropy_loss(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, diversity: float = 1.0, chunk: int | None = None
) -> Tensor:
    """mean_i H(p_i) − diversity · H(mean_i p_i), with p = softmax(rows·weightᵀ + bias), the second mean over all ranks.

    Args:
        rows: `[R, D]`; gradients reach all three.
        weight: `[V, D]`.
        bias: `[V]`.
        diversity: γ of LFQ and BSQ.
        chunk: rows at once; each chunk is recomputed in the backward pass, so no `[R, V]` is ever held.
    """

    def sums(part: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(F.linear(part, weight, bias), dim=-1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    each = in_chunks(sums, rows, chunk or max(1, CHUNK // weight.shape[0]))
    sample_entropy = torch.stack([entropy for entropy, _ in each]).sum() / rows.shape[0]
    mean_p = mean_over_ranks(torch.stack([total for _, total in each]).sum(0) / rows.shape[0])
    return sample_entropy + diversity * (mean_p * (mean_p + _LOG_GUARD).log()).sum()


def in_chunks(function: Callable[[Tensor], Any], rows: Tensor, chunk: int) -> list[Any]:
    """`function` of so many rows at once, what it computes on the way recomputed in the backward pass if there are several."""
    parts = rows.split(chunk)
    if len(parts) == 1:
        return [function(rows)]
    return [checkpoint(function, part, use_reentrant=False) for part in parts]
