"""Condition contrastive alignment (arXiv:2410.09347): a generator that needs no guidance, from one that does.

Shapes: `B` batch, `N` tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Likelihood = Callable[[Tensor, Tensor], Tensor]
"""Negative log-likelihood `[B, N]` of codes `[B, N]` given conditions `[B, …]`: `Generator.token_nll`, or a wrapper of it."""


def contrastive_loss(
    generator: Likelihood,
    reference: Likelihood,
    codes: Tensor,
    condition: Tensor,
    other: Tensor,
    *,
    beta: float = 0.02,
    weight: float = 300.0,
) -> dict[str, Tensor]:
    """Images are made likelier under their own class and less likely under another's, measured against the reference.

    `L = -log σ(β r(x, c)) - λ log σ(-β r(x, c'))`, `r` the log-ratio of `generator` to `reference`, all divided by max(λ, 1).
    Where both classes are the same, e.g. because both were dropped, the second term is a positive of weight 1 as the first:
    guidance keeps working. Published λ: VAR d16, d20 50, d24 100, d30 1000; LlamaGen B, XL 1000, L 300.

    Args:
        generator: to be trained; one epoch at a rate of 2e-5 (VAR) or 1e-5 (LlamaGen).
        reference: what it began as, frozen; dropout stays on in both.
        codes: `[B, N]`.
        condition: `c`, `[B, …]`.
        other: `c'`, the same shape: of another sample (the paper: of the next in the batch).
        beta: β.
        weight: λ.

    Returns:
        `loss`; `margin`, the mean of `r(x, c) - r(x, c')`.
    """
    both, twice = torch.cat((condition, other)), codes.repeat(2, 1)
    same = (condition == other).flatten(1).all(dim=1) if condition.ndim > 1 else condition == other
    with torch.no_grad():
        before = reference(twice, both).sum(1)
    positive, negative = (before - generator(twice, both).sum(1)).chunk(2)
    second = torch.where(same, -F.logsigmoid(beta * negative), -weight * F.logsigmoid(-beta * negative))
    loss = (-F.logsigmoid(beta * positive) + second).mean() / max(weight, 1.0)
    return {"loss": loss, "margin": (positive - negative).mean().detach()}
