"""Condition contrastive alignment (arXiv:2410.09347): a generator that needs no guidance, from one that does.

Shapes: `B` batch, `N` tokens of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generators.base import Generator


def contrastive_loss(
    generator: Generator,
    reference: Generator,
    codes: Tensor,
    condition: Tensor,
    dropped: Tensor,
    *,
    beta: float = 0.02,
    weight: float = 300.0,
) -> dict[str, Tensor]:
    """Images are made likelier under their own class and less likely under another's, measured against the reference.

    `L = -log σ(β r(x, c)) - λ log σ(-β r(x, c'))`, `r` the log-ratio of `generator` to `reference`, `c'` the class of the next
    sample, all divided by max(λ, 1). Where the class is dropped, or both are the same, the second term is a positive of weight
    1 as the first: guidance keeps working. Published λ: VAR d16, d20 50, d24 100, d30 1000; LlamaGen B, XL 1000, L 300.

    Args:
        generator: to be trained; one epoch at a rate of 2e-5 (VAR) or 1e-5 (LlamaGen).
        reference: what it began as, frozen; dropout stays on in both.
        codes: `[B, N]`.
        condition: `[B, …]`.
        dropped: bool `[B]`, samples without their condition (the paper: a tenth).
        beta: β.
        weight: λ.

    Returns:
        `loss`; `margin`, the mean of `r(x, c) - r(x, c')`.
    """
    null = generator.null(condition)
    flags = dropped.view(-1, *[1] * (condition.ndim - 1))
    own, other = (torch.where(flags, null, each) for each in (condition, condition.roll(-1, dims=0)))
    both = torch.cat((own, other))
    same = (own == other).flatten(1).all(dim=1) if own.ndim > 1 else own == other
    twice = codes.repeat(2, 1)
    with torch.no_grad():
        before = reference.token_nll(twice, both).sum(1)
    positive, negative = (before - generator.token_nll(twice, both).sum(1)).chunk(2)
    second = torch.where(same, -F.logsigmoid(beta * negative), -weight * F.logsigmoid(-beta * negative))
    loss = (-F.logsigmoid(beta * positive) + second).mean() / max(weight, 1.0)
    return {"loss": loss, "margin": (positive - negative).mean().detach()}
