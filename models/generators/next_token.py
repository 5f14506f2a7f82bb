"""Next-token generator: LlamaGen's class-conditional GPT (arXiv:2406.06525) and its relatives, over any in-order plan.

Shapes: `B` batch, `N` tokens of an image, `S` slots, `L` slots of one pass, `C` width, `V` vocabulary, `D` head width.
Slot 0 holds the class, slot i the code of token i-1; slot i predicts token i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from ..attention import Context, KVCache, rope_table
from ..layers import init_normal
from .base import Generator
from .plan import Plan, raster, sequence
from .transformer import Transformer, TransformerConfig

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


@dataclass
class DecodeState:
    """A generation under way.

    Args:
        memory: the cache of all rows that may ever be used.
        cache: its rows in use.
        condition: `[B]` of the rows in use.
        codes: `[B, N]` committed so far.
        compiled: run the repeated step through `torch.compile`.
    """

    memory: KVCache
    cache: KVCache
    condition: Tensor
    codes: Tensor
    compiled: bool = False


class NextToken(Generator):
    """Class-conditional next-token transformer: RMSNorm, SwiGLU, rotary positions, the class as prefix slot.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grid: rows and columns of the tokens: 2-D rotary positions, raster order.
        n_tokens: number of tokens of a 1-D tokenizer: 1-D rotary positions. Exactly one of `grid`, `n_tokens`.
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads.
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
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        n_tokens: PositiveInt | None = None,
        dim: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        multiple_of: PositiveInt = 256,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
        drop_path: Fraction = 0.0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_classes, self.token_dropout = vocab_size, num_classes, token_dropout
        self.plan = _make_plan(grid, n_tokens)
        config = TransformerConfig(
            dim,
            layers,
            heads,
            multiple_of=multiple_of,
            resid_dropout=resid_dropout,
            ffn_dropout=ffn_dropout,
            drop_path=drop_path,
        )
        axes = len(self.plan.coords[0])
        if config.head_dim % (2 * axes):
            raise ValueError(f"a head is {config.head_dim} wide; {axes}-D rotary positions need a multiple of {2 * axes}")
        self.classes = nn.Embedding(num_classes + 1, dim)
        self.tokens = nn.Embedding(vocab_size, dim)
        self.transformer = Transformer(config)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        init_normal(self)
        nn.init.zeros_(self.head.weight)
        self._ropes: dict[torch.device, Tensor] = {}

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits `[B, N, V]` of codes `[B, N]` given conditions `[B]`."""
        return self.head(self._hidden(codes, condition, self.plan.n_slots))

    def loss(self, codes: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, of float32 logits."""
        codes = codes.long()
        logits = self.logits(codes, condition).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}

    def recompute(self, codes: Tensor, condition: Tensor, unit: int) -> Tensor:
        """Logits `[B, 1, V]` of `unit` by a full pass over the slots up to it."""
        return self.head(self._hidden(codes, condition, unit + 1)[:, -1:])

    @torch.no_grad()
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> DecodeState:
        """Allocate the cache for `capacity` rows; nothing is computed yet."""
        rows, device = condition.shape[0], condition.device
        config, dtype = self.transformer.config, self.head.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        memory = KVCache(
            config.layers, capacity or rows, config.heads, self.plan.n_slots, config.head_dim, device=device, dtype=dtype
        )
        codes = condition.new_zeros(rows, self.plan.n_tokens)
        return DecodeState(memory, memory.rows(0, rows), condition, codes, compile)

    @torch.no_grad()
    def propose(self, state: DecodeState, unit: int) -> Tensor:
        """Logits `[B, 1, V]` of token `unit`."""
        if unit == 0:
            x = self.classes(state.condition)[:, None]
        elif state.compiled:
            position = torch.tensor([unit], device=state.codes.device)
            return _compiled_step()(self, state.codes[:, unit - 1 : unit], position, state.cache)
        else:
            x = self.tokens(state.codes[:, unit - 1 : unit])
        rope = self._rope(x.device)[:, unit : unit + 1]
        return self.head(self.transformer(x, Context(rope, cache=state.cache)))

    @torch.no_grad()
    def commit(self, state: DecodeState, unit: int, values: Tensor) -> None:
        """Fix token `unit` to `values [B, 1]`."""
        state.codes[:, unit : unit + 1] = values
        state.cache.length = unit + 1

    @torch.no_grad()
    def join(self, state: DecodeState, condition: Tensor, codes: Tensor, unit: int) -> None:
        """Add rows with the first `unit` tokens of `codes` behind them, in one pass."""
        start = state.condition.shape[0]
        stop = start + condition.shape[0]
        if unit:
            fresh = state.memory.rows(start, stop)
            fresh.length = 0
            self._hidden(codes, condition, unit, fresh)
        state.condition = torch.cat((state.condition, condition))
        state.codes = torch.cat((state.codes, codes))
        self._use_rows(state, stop)

    @torch.no_grad()
    def keep(self, state: DecodeState, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        state.condition, state.codes = state.condition[:rows], state.codes[:rows].clone()
        self._use_rows(state, rows)

    def _use_rows(self, state: DecodeState, rows: int) -> None:
        length = state.cache.length
        state.cache = state.memory.rows(0, rows)
        state.cache.length = length

    def _hidden(self, codes: Tensor, condition: Tensor, slots: int, cache: KVCache | None = None) -> Tensor:
        """Hidden states `[B, slots, C]` of the first slots, all known: a training or prefill pass."""
        x = torch.cat((self.classes(condition)[:, None], self.tokens(codes[:, : slots - 1].long())), dim=1)
        x = F.dropout(x, self.token_dropout, self.training)
        return self.transformer(x, Context(self._rope(x.device)[:, :slots], causal=self.plan.causal, cache=cache))

    def _rope(self, device: torch.device) -> Tensor:
        # Not a buffer: a model built on the meta device would never get its values, and no checkpoint should hold it.
        if device not in self._ropes:
            with torch.inference_mode(False):  # kept for training, where a tensor born in inference mode is refused
                self._ropes[device] = rope_table(self.plan.coords, self.transformer.config.head_dim).to(device)
        return self._ropes[device]

    def _step(self, previous: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """The repeated step with shapes that never change: logits `[B, 1, V]` after the codes `previous [B, 1]`."""
        rope = self._rope(previous.device)[:, position]
        seen = torch.arange(self.plan.n_slots, device=position.device)[None] <= position
        cache.position = position
        logits = self.head(self.transformer(self.tokens(previous), Context(rope, mask=seen, cache=cache)))
        cache.position = None
        return logits


@functools.cache
def _compiled_step() -> Callable[[NextToken, Tensor, Tensor, KVCache], Tensor]:
    # Of the class, not of one model: a copy of a model would else carry a step that is bound to the weights of the first.
    return torch.compile(NextToken._step, dynamic=False)


def _make_plan(grid: tuple[int, int] | None, n_tokens: int | None) -> Plan:
    if (grid is None) == (n_tokens is None):
        raise ValueError("give exactly one of grid (2-D tokens) and n_tokens (1-D tokens)")
    return raster((grid[0], grid[1])) if grid is not None else sequence(int(n_tokens or 0))
