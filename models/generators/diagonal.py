"""Diagonal generator: NAR (neighbour autoregressive, arXiv:2503.10696), which reveals one anti-diagonal at a time.

Shapes: `B` batch, `N` tokens of an image, `L` slots of one pass, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from ..attention import Context
from ..layers import RMSNorm
from .grid import GridTransformer, required
from .orders import diagonals
from .planned import Facts
from .transformer import TransformerConfig


class NAR(GridTransformer):
    """NAR: a slot predicts its token's right neighbour, and after one more block the one below.

    A token's logits are the mean of what its left and its upper neighbour say; in the first row and the first column there is
    but one of them. The class says the first token by both heads.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grid: rows and columns of the tokens.
        dim: width `C`.
        layers: number of blocks before the right head; the head below has one more.
        heads: attention heads.
        multiple_of: the feed-forward's hidden width, two thirds of `4·dim`, is rounded up to a multiple of this.
        token_dropout: rate on the input embeddings.
        resid_dropout: rate after each attention.
        ffn_dropout: rate after each feed-forward.

    Raises:
        ValueError: there is no grid, the heads have no room for 2-D rotary positions.
    """

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        dim: PositiveInt = 1024,
        layers: PositiveInt = 24,
        heads: PositiveInt = 16,
        multiple_of: PositiveInt = 256,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
    ) -> None:
        config = TransformerConfig(
            dim, layers + 1, heads, multiple_of=multiple_of, resid_dropout=resid_dropout, ffn_dropout=ffn_dropout
        )
        super().__init__(diagonals(required(grid)), vocab_size, num_classes, config, token_dropout)
        self.right_norm = RMSNorm(dim)
        self.below = nn.Linear(dim, vocab_size, bias=False)  # as published it does not begin at zero, the other head does
        nn.init.normal_(self.below.weight, std=0.02)
        sources, shares = _sources(self.plan.perm, self.plan.predicts)
        self._source_of, self._share_of = Facts(sources), Facts(shares)

    def _transform(self, x: Tensor, context: Context, modulation: Tensor | None) -> Tensor:
        """Hidden states `[B, L, 2, C]` for the heads right and below."""
        blocks = len(self.transformer.blocks)
        right = self.transformer.through(x, context, range(blocks - 1))
        below = self.transformer.through(right, context, range(blocks - 1, blocks))
        return torch.stack((self.right_norm(right), self.transformer.norm(below)), dim=2)

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        tokens = slice(self.plan.committed[first], self.plan.committed[last])
        source = self._source_of.on(hidden.device)[:, tokens] - self.plan.span(first).start
        share = self._share_of.on(hidden.device)[:, tokens, None].to(hidden.dtype)
        right, below = (hidden[:, source[head].clamp(min=0), head] * share[head] for head in (0, 1))
        return self.head(right) + self.below(below)


def _sources(perm: tuple[int, ...], predicts: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """The slot `[2, N]` that predicts each token (in order of `perm`) by each head, and the head's share of its logits."""
    found = [{token: slot for slot, heads in enumerate(predicts) if (token := heads[head]) >= 0} for head in (0, 1)]
    known = torch.tensor([[float(token in slots) for token in perm] for slots in found], device="cpu")
    return torch.tensor([[slots.get(token, 0) for token in perm] for slots in found], device="cpu"), known / known.sum(0)
