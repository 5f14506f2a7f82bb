"""How a sample comes into being: its images after some of the steps of a generator's plan.

Shapes: `B` samples, `N` tokens, `K` stages. Images are uint8 `[B, H, W, 3]` unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.stream import to_uint8
from ..models.generators.plan import Plan
from ..models.tokenizers.base import Tokenizer
from .images import Picture
from .prefixes import build_up

STAGES = 8
"""Columns of the picture at most."""
HIDDEN = 128
"""Grey of a place that is not yet revealed."""


@torch.no_grad()
def reveal(tokenizer: Tokenizer, plan: Plan, codes: Tensor) -> Picture | None:
    """One row for each sample: from the first step of the plan to the last.

    Where the first tokens of the layout decode to an image and come first, that is what is shown (whole scales, levels or a
    row's beginning). In one grid revealed in any order a place stays grey until its token is there; what is seen of the
    image is of all tokens, since decoders look beyond the cell of a token.

    Args:
        tokenizer: decodes, on the device of `codes`.
        plan: of the generator.
        codes: `[B, N]`, all drawn.

    Returns:
        `None` where tokens are neither a prefix nor have a place.
    """
    if plan.in_layout_order and (built := build_up(tokenizer, codes)):
        return built
    if plan.grid is None or plan.n_tokens != plan.grid[0] * plan.grid[1]:
        return None
    done = stages(plan)
    images = to_uint8(tokenizer.decode(codes))
    unit = torch.tensor(plan.revealed_at, device=codes.device).view(1, 1, *plan.grid).float()
    places = F.interpolate(unit, size=images.shape[1:3], mode="nearest")[0, 0, ..., None]
    shown = torch.stack([torch.where(places < stop, images, HIDDEN) for stop in done], dim=1)
    return Picture(shown.flatten(0, 1), [str(plan.committed[stop]) for stop in done], _note(plan))


def stages(plan: Plan) -> list[int]:
    """Numbers of steps after which an image is shown, evenly spaced, the last among them: at most `STAGES`."""
    count = min(STAGES, plan.n_units)
    return [round((i + 1) * plan.n_units / count) for i in range(count)]


def _note(plan: Plan) -> str:
    return f"{plan.n_tokens} tokens in {plan.n_units} steps; grey: not yet drawn."
