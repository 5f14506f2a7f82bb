"""Next-token generators: LlamaGen's GPT (arXiv:2406.06525) and its relatives GigaTok's and D-AR's, over grids and rows.

Shapes: `B` batch, `N` tokens of an image, `P` prefix slots, `L` slots of one pass, `C` width, `V` vocabulary.
The last prefix slot predicts token 0, the slot that holds token i predicts token i + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, NonNegativeInt, PositiveInt
from ..attention import Context, KVCache, rope_table
from ..layers import init_normal
from .conditions import TextCondition
from .orders import raster_or_sequence
from .plan import Plan
from .planned import DecodeState, Facts, PlannedGenerator
from .transformer import TransformerConfig

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
QK_EPS = 1e-5  # GigaTok's, PyTorch's default


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

    compiles_steps = True

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
        config = TransformerConfig(
            dim,
            layers,
            heads,
            qk_norm="layer" if qk_norm else "none",
            qk_eps=QK_EPS,
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
        init_normal(self)
        for zeroed in (self.head, *self._modulations()):
            for parameter in zeroed.parameters():
                nn.init.zeros_(parameter)
        slots = 1 + self.plan.n_slots  # the last token is never fed: its row is there because the published table has it
        self.positions = nn.Parameter(torch.randn(slots, dim) * dim**-0.5) if positions == "learned" else None
        self._rotary = None if positions == "learned" else Facts(_rotary(self.plan, config.head_dim, positions))

    def _modulations(self) -> list[nn.Module]:
        """Adaptive layer norms begin as none (GigaTok's, DiT's)."""
        layers = [block.modulation for block in self.transformer.blocks]
        return [layer for layer in (*layers, self.transformer.shared, self.transformer.final) if isinstance(layer, nn.Module)]

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

    @torch.no_grad()
    def propose(self, state: DecodeState, unit: int) -> Tensor:
        """Logits `[B, 1, V]` of token `unit`."""
        start = self.plan.span(unit).start
        if not state.compiled or state.cache.length < start or unit == 0:
            return super().propose(state, unit)
        position = torch.tensor([start], device=state.codes.device)
        state.calls += 1
        return _compiled_step()(self, state.codes[:, unit - 1 : unit], state.condition, position, state.cache)

    def _step(self, previous: Tensor, condition: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """The repeated step with shapes that never change: logits `[B, 1, V]` after the codes `previous [B, 1]`."""
        x = self.tokens(previous)
        if self.positions is not None:
            x = x + self.positions[position]
        rope = None if self._rotary is None else self._rotary.on(x.device)[:, position]
        seen = torch.arange(self.plan.n_slots, device=position.device)[None] <= position
        if (padding := self._padding(condition)) is not None:
            seen = (seen & F.pad(padding, (0, self.plan.n_slots - padding.shape[1]), value=True))[:, None, None]
        cache.position = position
        context = Context(rope, mask=seen, cache=cache)
        hidden = self.transformer(x, context, self._modulation(condition, slice(0, 1)))
        cache.position = None
        return self.head(hidden)


@functools.cache
def _compiled_step() -> Callable[[NextToken, Tensor, Tensor, Tensor, KVCache], Tensor]:
    # Of the class, not of one model: a copy of a model would else carry a step that is bound to the weights of the first.
    return torch.compile(NextToken._step, dynamic=False)


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
