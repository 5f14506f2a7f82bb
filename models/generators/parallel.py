"""Parallel generator: PAR (arXiv:2412.15119), which reveals one token of each region of the grid at a time."""

from __future__ import annotations

from ...ranges import Fraction, PositiveInt
from .grid import GridTransformer, required
from .orders import parallel
from .transformer import TransformerConfig


class PAR(GridTransformer):
    """PAR: the first token of each region one by one, then those at the same place of all regions at once.

    A slot predicts the next token of its own region. Learned fillers make up the first parallel step, where only one region's
    token is new. Slots of a step see each other.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grid: rows and columns of the tokens.
        regions: rows and columns of regions; PAR-4x: 2 and 2, PAR-16x: 4 and 4.
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads.
        multiple_of: the feed-forward's hidden width, two thirds of `4·dim`, is rounded up to a multiple of this.
        token_dropout: rate on the input embeddings.
        resid_dropout: rate after each attention.
        ffn_dropout: rate after each feed-forward.

    Raises:
        ValueError: there is no grid, the regions do not divide the grid, or the heads have no room for 2-D rotary positions.
    """

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        regions: tuple[PositiveInt, PositiveInt] = (2, 2),
        dim: PositiveInt = 1280,
        layers: PositiveInt = 36,
        heads: PositiveInt = 20,
        multiple_of: PositiveInt = 256,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
    ) -> None:
        config = TransformerConfig(
            dim, layers, heads, multiple_of=multiple_of, resid_dropout=resid_dropout, ffn_dropout=ffn_dropout
        )
        plan = parallel(required(grid), (regions[0], regions[1]))
        super().__init__(plan, vocab_size, num_classes, config, token_dropout)
