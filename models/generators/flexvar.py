"""FlexVAR's generator (Jiao et al. 2025): next-scale over codes that are no residuals, so over any list of scales.

Shapes: `B` batch, `N` tokens of all scales, `L` slots of one pass, `C` width, `D` width of a code, `V` vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from ..layers import sincos_table
from ..tokenizers.base import Tokenizer
from ..tokenizers.flexvar import FlexVAR as FlexVARTokenizer
from .next_scale import Loan, ScaleGenerator, var_config
from .orders import Grid
from .orders import scales as scales_plan

_plan_over = functools.lru_cache(maxsize=256)(scales_plan)


class FlexVAR(ScaleGenerator):
    """Slots of a scale hold the vectors of the scale before, upsampled to its grid; places come from one map for all grids.

    Each training step draws its own set of the stored scales. The first and the last are always in it. A share of the steps
    takes the standard set; the others so many of each group, less some where they would be too many tokens.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grids: rows and columns of each stored scale, coarse first.
        embed_dim: width of a code `D`.
        dim: width `C`; 64 for each block.
        layers: number of blocks.
        heads: attention heads; as many as blocks.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        gate_init: scale of the initial γ of each block.
        map_size: side of the map of places, which is area-resized to each grid.
        groups: `[lowest, highest, count]`: of the scales of so many rows, so many are drawn. None at all: every scale is kept.
        standard: rows of the scales of the standard set.
        standard_share: share of the steps that take it.
        max_tokens: of a set that is drawn.
        label_smoothing: of the cross-entropy.

    Raises:
        ValueError: the heads do not divide the width, or the scales always kept exceed `max_tokens`.
    """

    undecayed = (*ScaleGenerator.undecayed, "place_map")

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grids: Sequence[Sequence[PositiveInt]],
        embed_dim: PositiveInt,
        dim: PositiveInt = 1024,
        layers: PositiveInt = 16,
        heads: PositiveInt = 16,
        drop_path: Fraction = 0.0,
        gate_init: NonNegativeFloat = 1e-3,
        map_size: PositiveInt = 32,
        groups: Sequence[tuple[PositiveInt, PositiveInt, NonNegativeInt]] = ((1, 2, 2), (3, 10, 5), (11, 15, 2)),
        standard: Sequence[PositiveInt] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        standard_share: Fraction = 0.05,
        max_tokens: PositiveInt = 680,
        label_smoothing: Fraction = 0.0,
    ) -> None:
        config = var_config(dim, layers, heads, shared_modulation=False, qk_l2=True, drop_path=drop_path)
        pairs = tuple((rows, columns) for rows, columns in grids)
        super().__init__(pairs, vocab_size, num_classes, embed_dim, config, label_smoothing)
        least = _tokens([pairs[0], pairs[-1]])
        if groups and least > max_tokens:
            raise ValueError(f"max_tokens {max_tokens} are fewer than the {least} of first and last scale; raise it")
        self.groups = tuple(tuple(group) for group in groups)
        self.standard, self.standard_share, self.max_tokens = frozenset(standard), standard_share, max_tokens
        self.place_map = nn.Parameter(sincos_table((map_size, map_size), dim).T.unflatten(1, (map_size, map_size)).contiguous())
        self._init_weights(gate_init)

    def bind(self, tokenizer: Tokenizer) -> None:
        """Reconstruct with this tokenizer.

        Raises:
            UserError: its scales are residuals, or others.
        """
        if not isinstance(tokenizer, FlexVARTokenizer):
            raise UserError(
                f"FlexVAR needs codes that are no residuals, those of a {type(tokenizer).__name__} are",
                where="generator",
                fix="train on the codes of tokenizer=flexvar, or choose generator=var_…",
            )
        super().bind(tokenizer)

    def over(self, grids: Sequence[Grid]) -> FlexVAR:
        """The same weights over other scales; codes then lie as in those.

        Raises:
            UserError: the first scale is another, which begins with learned vectors of its own.
        """
        if tuple(grids[0]) != self.grids[0]:
            raise UserError(
                f"scales that begin with {tuple(grids[0])}", where="scales", fix=f"begin with {self.grids[0]}, as in training"
            )
        view = copy.copy(self)
        view.grids = tuple((rows, columns) for rows, columns in grids)
        view._follow(_plan_over(view.grids))
        tokenizer: Any = self.tokenizer
        view._tokenizer = Loan(tokenizer.over(view.grids))
        return view

    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token: of all codes `[B, N]`, while training of the scales drawn for this step."""
        if not self.training or not self.groups:
            return super().loss(codes, condition, noise)
        kept = self.draw()
        columns = [self.plan.columns(scale) for scale in kept]
        view = self.over([self.grids[scale] for scale in kept])
        return super(FlexVAR, view).loss(torch.cat([codes[:, part] for part in columns], dim=1), condition, noise)

    def draw(self) -> list[int]:
        """Scales of one training step, rising. The draw follows torch's RNG, which training seeds by its step."""
        last = len(self.grids) - 1
        if float(torch.rand(())) < self.standard_share:
            chosen = {scale for scale, (rows, _) in enumerate(self.grids) if rows in self.standard}
        else:
            chosen = {scale for group in self.groups for scale in self._draw_from(*group)}
        free = [scale for scale in sorted(chosen) if scale not in (0, last)]
        while _tokens([self.grids[scale] for scale in (0, *free, last)]) > self.max_tokens:
            free.pop(int(torch.randint(len(free), ())))
        return sorted({0, *free, last})

    def _draw_from(self, lowest: int, highest: int, count: int) -> list[int]:
        group = [scale for scale, (rows, _) in enumerate(self.grids) if lowest <= rows <= highest]
        return [group[place] for place in torch.randperm(len(group))[:count].tolist()]

    def _places(self, slots: slice) -> Tensor:
        parts, first = [], 0
        for rows, columns in self.grids:
            if slots.start < first + rows * columns and first < slots.stop:
                parts.append(F.interpolate(self.place_map[None], (rows, columns), mode="area")[0].flatten(1).T)
            first += rows * columns
        return torch.cat(parts)


def _tokens(grids: Sequence[Grid]) -> int:
    return sum(rows * columns for rows, columns in dict.fromkeys(grids))
