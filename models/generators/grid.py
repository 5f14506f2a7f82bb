"""LlamaGen's transformer over any plan of a grid: the class, then tokens and fillers, at rotary places.

Shapes: `B` batch, `N` tokens of an image, `L` slots of one pass, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import rope_table
from ..layers import init_normal
from .orders import Grid
from .plan import Plan
from .planned import Facts, PlannedGenerator
from .transformer import TransformerConfig

NO_FILLER = -1


class GridTransformer(PlannedGenerator):
    """Slot 0 is the class, a slot that holds no token a learned filler of its own; every slot predicts by one linear head.

    Args:
        plan: over a grid.
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        config: of the transformer.
        token_dropout: rate on the input embeddings.

    Raises:
        ValueError: the heads have no room for 2-D rotary positions.
    """

    def __init__(self, plan: Plan, vocab_size: int, num_classes: int, config: TransformerConfig, token_dropout: float) -> None:
        super().__init__(plan, vocab_size, num_classes, config)
        self.token_dropout = token_dropout
        self._rotary = Facts(rope_table(plan.coords, config.head_dim))
        holds = torch.tensor(plan.holds, device="cpu")[1:]
        self._held = Facts(holds.clamp(min=0))
        self._filler = Facts(torch.where(holds < 0, (holds < 0).cumsum(0) - 1, NO_FILLER))
        count = int((holds < 0).sum())
        self.classes = nn.Embedding(num_classes + 1, config.dim)
        self.tokens = nn.Embedding(vocab_size, config.dim)
        self.fillers = nn.Embedding(count, config.dim) if count else None
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        init_normal(self)
        nn.init.zeros_(self.head.weight)

    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        after_class = slice(max(slots.start - 1, 0), slots.stop - 1)
        x = self.tokens(codes[:, self._held.on(codes.device)[after_class]])
        if self.fillers is not None:
            filler = self._filler.on(codes.device)[after_class, None]
            x = torch.where(filler == NO_FILLER, x, self.fillers(filler[:, 0].clamp(min=0)))
        if slots.start == 0:
            x = torch.cat((self.classes(condition)[:, None], x), dim=1)
        return F.dropout(x, self.token_dropout, self.training)

    def _rope(self, slots: slice, device: torch.device) -> Tensor | None:
        return self._rotary.on(device)[:, slots]

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        return self.head(hidden)


def required(grid: tuple[int, int] | None) -> Grid:
    """The grid that these generators cannot do without.

    Raises:
        ValueError: there is none.
    """
    if grid is None:
        raise ValueError("the tokens form no grid; choose a next-token generator, or codes of a tokenizer with a grid")
    return grid[0], grid[1]
