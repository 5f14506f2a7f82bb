"""Next-token generators: LlamaGen's GPT (arXiv:2406.06525) and its relatives GigaTok's and D-AR's, over grids and rows.

Shapes: `B` batch, `N` tokens of an image, `P` prefix slots, `L` slots of one pass, `C` width, `V` vocabulary.
The last prefix slot predicts token 0, the slot that holds token i predicts token i + 1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, NonNegativeInt, PositiveInt
from ..attention import rope_table
from .conditions import TextCondition
from .llama import init_llama, learned_places, llama_config
from .orders import raster_or_sequence
from .plan import Plan
from .planned import Facts, PlannedGenerator

# The published sizes: width, blocks, heads.
SIZES = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
    "1B": (2048, 22, 32),
    "3B": (3200, 24, 32),
    "7B": (4096, 32, 32),
}


class NextToken(PlannedGenerator):
    """Next-token transformer: RMSNorm, SwiGLU, a class or a text as prefix slots.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class". A text needs none.
        grid: rows and columns of the tokens, in raster order.
        n_tokens: number of tokens of a 1-D tokenizer. Exactly one of `grid`, `n_tokens`.
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads.
        positions: `rotary`, 2-D over a grid and 1-D over a row, the class without a place (LlamaGen: its queries and keys are
            zero); `rotary_class`, 1-D with the class at place 0 (D-AR); `learned`, a table of the class and all tokens
            (GigaTok).
        qk_norm: LayerNorm of each head's queries and keys.
        modulation: adaptive layer norm by the class besides its slot.
        condition: how texts are read (`TextCondition`); `None`: the condition is a class.
        multiple_of: the feed-forward's hidden width, two thirds of `4·dim`, is rounded up to a multiple of this.
        token_dropout: rate on the input embeddings.
        resid_dropout: rate after each attention.
        ffn_dropout: rate after each feed-forward.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: arguments that contradict each other.
    """

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: NonNegativeInt,
        grid: tuple[int, int] | None = None,
        n_tokens: PositiveInt | None = None,
        dim: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        positions: Literal["rotary", "rotary_class", "learned"] = "rotary",
        qk_norm: bool = False,
        modulation: Literal["none", "block", "shared"] = "none",
        condition: nn.Module | None = None,
        multiple_of: PositiveInt = 256,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
        drop_path: Fraction = 0.0,
    ) -> None:
        config = llama_config(
            dim,
            layers,
            heads,
            qk_norm=qk_norm,
            modulation=modulation,
            multiple_of=multiple_of,
            resid_dropout=resid_dropout,
            ffn_dropout=ffn_dropout,
            drop_path=drop_path,
        )
        text = _checked(condition, num_classes, dim, modulation)
        super().__init__(raster_or_sequence(grid, n_tokens, text.tokens if text else 1), vocab_size, num_classes, config)
        self.token_dropout = token_dropout
        self.condition = text
        self.classes = nn.Embedding(num_classes + 1, dim) if text is None else None
        self.tokens = nn.Embedding(vocab_size, dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        init_llama(self, self.transformer, self.head)
        slots = 1 + self.plan.n_slots  # the last token is never fed: its row is there because the published table has it
        self.positions = learned_places(slots, dim) if positions == "learned" else None
        self._rotary = None if positions == "learned" else Facts(_rotary(self.plan, config.head_dim, positions))

    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        prefix = self.plan.prefix + 1
        parts = [self._prefix(condition)] if slots.start == 0 else []
        held = codes[:, max(slots.start - prefix, 0) : slots.stop - prefix]
        x = torch.cat((*parts, self.tokens(held)), dim=1) if held.shape[1] or not parts else parts[0]
        if self.positions is not None:
            x = x + self.positions[slots]
        return F.dropout(x, self.token_dropout, self.training)

    def _prefix(self, condition: Tensor) -> Tensor:
        """The slots before the first token, `[B, P, C]`."""
        if self.condition is not None:
            return self.condition(condition)
        assert self.classes is not None
        return self.classes(condition)[:, None]

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        return self.head(hidden[:, self.plan.prefix :] if first == 0 and self.plan.prefix else hidden)

    def _modulation(self, condition: Tensor, slots: slice) -> Tensor | None:
        if self.transformer.final is None:
            return None
        signal = self._prefix(condition)
        return signal if self.positions is None else signal + self.positions[:1]

    def _padding(self, condition: Tensor) -> Tensor | None:
        return None if self.condition is None else self.condition.padding(condition)

    @property
    def text(self) -> TextCondition | None:
        """How it reads texts; `None`: it is conditioned on classes."""
        return self.condition

    def null(self, condition: Tensor) -> Tensor:
        """The condition of the same rows that means "no condition"."""
        return super().null(condition) if self.condition is None else self.condition.null(condition)

    def check_condition(self, condition: Tensor) -> None:
        """See `Generator.check_condition`."""
        return super().check_condition(condition) if self.condition is None else self.condition.check(condition)

    def _rope(self, slots: slice, device: torch.device) -> Tensor | None:
        return None if self._rotary is None else self._rotary.on(device)[:, slots]


def _checked(condition: nn.Module | None, num_classes: int, dim: int, modulation: str) -> TextCondition | None:
    if condition is None:
        if num_classes < 1:
            raise ValueError("no classes and no condition; give num_classes, or a condition that reads texts")
        return None
    if not isinstance(condition, TextCondition):
        raise ValueError(f"{type(condition).__name__} reads no condition; give a TextCondition, or null for classes")
    if condition.dim != dim:
        raise ValueError(
            f"a condition of width {condition.dim} in a generator of width {dim}; set generator.condition.dim={dim}"
        )
    if modulation != "none":
        raise ValueError("texts do not modulate; set modulation=none")
    return condition


def _rotary(plan: Plan, head_dim: int, positions: str) -> Tensor:
    """Rows of all slots and of the last token, which a generator never feeds but its one-step student does."""
    if positions == "rotary_class":
        return rope_table([(slot,) for slot in range(plan.n_slots + 1)], head_dim)
    last = (plan.n_tokens - 1,) if plan.grid is None else (plan.grid[0] - 1, plan.grid[1] - 1)
    return rope_table([*plan.coords, last], head_dim)
