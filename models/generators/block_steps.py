"""Block diffusion's two streams of slots, and its steps of generation.

Shapes: `B` batch, `N` tokens of an image in the order of their blocks, `U` tokens of a block, `L` slots of one pass, `C` width,
`V` vocabulary. Slots: `N` noisy ones (a code, or the mask with id `V`), then the class, then `N` clean ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Context, KVCache, rope_table
from .base import StepwiseGenerator
from .llama import init_llama, learned_places
from .plan import Plan, block_mask
from .planned import DecodeState, Facts, facts_of, make_cache
from .static_step import compiled_step, static_step
from .transformer import Transformer, TransformerConfig


@dataclass
class BlockState(DecodeState):
    """A generation under way. Its `carry` is the hidden state of the last clean slot in the cache, `[B, C]`.

    Args:
        fresh: codes `[B, U]` of the last block while they wait for the next pass, which puts them into the cache.
    """

    fresh: Tensor | None = None


class BlockSteps(StepwiseGenerator):
    """LlamaGen's transformer over noisy and clean slots of the blocks of a plan.

    Args:
        plan: of two streams.
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        config: of the transformer.
        positions: see `NextToken`; both streams share them.
        shift: a slot predicts the next token of its block, and the clean slot before a block its first; else its own.
        token_dropout: rate on the input embeddings.

    Raises:
        ValueError: the heads have no room for such positions.
    """

    def __init__(
        self,
        plan: Plan,
        vocab_size: int,
        num_classes: int,
        config: TransformerConfig,
        positions: str,
        shift: bool,
        token_dropout: float,
    ) -> None:
        super().__init__()
        self.plan, self.vocab_size, self.num_classes = plan, vocab_size, num_classes
        self.shift, self.token_dropout = shift, token_dropout
        self.transformer = Transformer(config)
        self.classes = nn.Embedding(num_classes + 1, config.dim)
        self.tokens = nn.Embedding(vocab_size + 1, config.dim)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        self.positions = learned_places(1 + plan.n_tokens, config.dim) if positions == "learned" else None
        init_llama(self, self.transformer, self.head)
        self._lay_out(positions, config.head_dim)

    def _lay_out(self, positions: str, head_dim: int) -> None:
        """What follows from the plan alone: orders, places, and which slot predicts each token."""
        perm, count, starts = self.plan.perm, self.plan.n_tokens, set(self.plan.committed)
        rows = [1 + token for token in perm]
        self._mask, self._layout_order = facts_of(self.plan)
        self._order = Facts(torch.tensor(perm, device="cpu"))
        self._place = Facts(torch.tensor([*rows, 0, *rows], device="cpu"))
        predictor = [count + index if index in starts else index - 1 for index in range(count)]
        self._predictor = Facts(torch.tensor(predictor if self.shift else range(count), device="cpu"))
        coords = [(row,) for row in (*rows, 0, *rows)] if positions == "rotary_class" else self.plan.coords
        self._rotary = None if positions == "learned" else Facts(rope_table(coords, head_dim))

    @property
    def mask_id(self) -> int:
        """The row of the token table that stands for a hidden token."""
        return self.vocab_size

    def _both_streams(self, codes: Tensor, hidden: Tensor, condition: Tensor) -> Tensor:
        """Hidden states `[B, N, C]` of the slots that predict each token: one pass over noisy and clean slots."""
        everything = slice(0, self.plan.n_slots)
        noisy = self._embed(codes.masked_fill(hidden, self.mask_id), slice(0, codes.shape[1]))
        x = torch.cat((noisy, self._embed_clean(codes, condition)), dim=1)
        states = self._pass(x, condition, everything, mask=self._mask.on(x.device))
        return states[:, self._predictor.on(x.device)]

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Logits `[B, N, V]` of each block from those before it, nothing of itself known."""
        ordered = codes.long()[:, self._order.on(codes.device)]
        states = self._both_streams(ordered, torch.ones_like(ordered, dtype=torch.bool), condition)
        return self.head(states[:, self._layout_order.on(codes.device)])

    def _embed(self, ids: Tensor, slots: slice | Tensor) -> Tensor:
        """Input embeddings `[B, L, C]` of slots of tokens."""
        x = self.tokens(ids)
        return x if self.positions is None else x + self.positions[self._place.on(ids.device)[slots]]

    def _prefix(self, condition: Tensor) -> Tensor:
        """The class's slot, `[B, 1, C]`, which modulates too (GigaTok's)."""
        x = self.classes(condition)[:, None]
        return x if self.positions is None else x + self.positions[:1]

    def _embed_clean(self, codes: Tensor, condition: Tensor) -> Tensor:
        """The class and the clean slots of codes `[B, L]`: `[B, 1 + L, C]`."""
        first, count = self.plan.n_tokens + 1, codes.shape[1]
        return torch.cat((self._prefix(condition), self._embed(codes, slice(first, first + count))), dim=1)

    def _pass(
        self, x: Tensor, condition: Tensor, slots: slice, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states of consecutive slots with inputs `x`."""
        x = F.dropout(x, self.token_dropout, self.training)
        rope = None if self._rotary is None else self._rotary.on(x.device)[:, slots]
        whole = slots == slice(0, self.plan.n_slots)
        flex = block_mask(self.plan, slots.stop, x.device) if self.attention == "flex" and whole else None
        return self._transform(x, Context(rope, False, mask, cache, self.attention, flex), self._signal(condition))

    def _signal(self, condition: Tensor) -> Tensor | None:
        """What modulates, `[B, 1, C]`."""
        return None if self.transformer.final is None else self._prefix(condition)

    def _transform(self, x: Tensor, context: Context, modulation: Tensor | None) -> Tensor:
        return self.transformer(x, context, modulation)

    # ---- generation: the cache holds the class and the clean slots of blocks that are done

    @torch.no_grad()
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> BlockState:
        """Allocate the cache for `capacity` rows and put the class into it."""
        rows, count = len(condition), self.plan.n_tokens
        memory = make_cache(self.transformer, capacity or rows, 1 + count, condition.device)
        codes = torch.zeros(rows, count, dtype=torch.int64, device=condition.device)
        state = BlockState(memory, memory.rows(0, rows), condition, codes, compiled=compile, calls=1)
        state.carry = self._prefill(state.cache, condition, codes, 0)
        return state

    def _prefill(self, cache: KVCache, condition: Tensor, codes: Tensor, known: int) -> Tensor:
        """Put the class and the first `known` tokens into an empty cache; the last hidden state `[B, C]`."""
        first = self.plan.n_tokens
        slots = slice(first, first + 1 + known)
        x = self._embed_clean(codes[:, self._order.on(codes.device)[:known]], condition)
        states = self._pass(x, condition, slots, cache, self._mask.on(x.device)[slots, slots])
        cache.length = 1 + known
        return states[:, -1]

    @torch.no_grad()
    def propose(self, state: BlockState, unit: int) -> Tensor:
        """Logits `[B, U, V]` of a block of which nothing is known."""
        return self.refine(state, unit, state.codes.new_full((len(state.codes), len(self.plan.tokens(unit))), -1))

    @torch.no_grad()
    def refine(self, state: BlockState, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """Logits of a block, partly `filled`: noisy slots look at the cache and at each other, and leave no trace in it."""
        first, last = (0, filled.shape[1]) if window is None else (window.start, window.stop)
        if window is not None:
            self._settle(state)
        if self.shift and last == 1:  # the clean slot before it tells all
            self._settle(state)
            assert state.carry is not None
            return self.head(state.carry[:, None])
        begin = max(first - self.shift, 0)
        noisy = filled[:, begin:last]
        states = self._step(state, noisy.masked_fill(noisy < 0, self.mask_id), begin, filled.shape[1], window is None)
        if not self.shift:
            return self.head(states)
        assert state.carry is not None
        before = [state.carry[:, None]] if first == 0 else []
        return self.head(torch.cat((*before, states[:, :-1]), dim=1))

    def _settle(self, state: BlockState) -> None:
        """Put the block that waits into the cache by a pass of its own."""
        if state.fresh is not None:
            self._step(state, state.fresh[:, :0], 0, 0, True)

    def _step(self, state: BlockState, noisy: Tensor, begin: int, size: int, whole: bool) -> Tensor:
        """One pass over the block that waits, if one does, and noisy slots of the next; hidden states `[B, L, C]` of these.

        The clean slots go into the cache for good, as in ACDiT; they do not see the noisy ones, which lie behind them.

        Args:
            state: of the generation.
            noisy: ids `[B, L]` of the slots from `begin` on.
            begin: the first of them within its block.
            size: of the block.
            whole: they are all of it; else keys and values of the rest of it are those of the last pass.
        """
        cache, device = state.cache, noisy.device
        fresh = noisy[:, :0] if state.fresh is None else state.fresh
        clean, length = fresh.shape[1], cache.length
        known, waits, asks = length + clean, torch.arange(clean, device=device), torch.arange(noisy.shape[1], device=device)
        slots = torch.cat((waits + self.plan.n_tokens + length, asks + begin + known - 1))
        x = self._embed(torch.cat((fresh, noisy), dim=1), slots)
        rope = None if self._rotary is None else self._rotary.on(device)[:, slots]
        ends = torch.cat((waits.new_full((clean,), known), asks.new_full(asks.shape, known + size)))
        seen = torch.arange(cache.keys.shape[3], device=device) < ends[:, None]
        signal = self._signal(state.condition)
        if state.compiled or not whole:
            step: Callable[..., Tensor] = compiled_step() if state.compiled else static_step
            states = step(self, x, rope, torch.cat((waits + length, asks + begin + known)), seen, signal, cache)
        else:
            mask = seen[:, : known + size] if clean and size else None
            states = self._transform(x, Context(rope, mask=mask, cache=cache, kernel=self.attention), signal)
        state.calls += 1
        if clean:
            state.carry, state.fresh, cache.length = states[:, clean - 1], None, known
        return states[:, clean:]

    @torch.no_grad()
    def refine_anew(self, codes: Tensor, condition: Tensor, unit: int, filled: Tensor) -> Tensor:
        """The same by a pass over both streams."""
        seen, order = slice(self.plan.committed[unit], self.plan.committed[unit + 1]), self._order.on(codes.device)
        ordered = codes.long()[:, order]
        ordered[:, seen] = filled.clamp(min=0)
        hidden = torch.ones_like(ordered, dtype=torch.bool)
        hidden[:, seen] = filled < 0
        return self.head(self._both_streams(ordered, hidden, condition)[:, seen])

    @torch.no_grad()
    def commit(self, state: BlockState, unit: int, values: Tensor) -> None:
        """Fix the codes `[B, U]` of a block; the next pass puts it into the cache, after the last block none."""
        self._settle(state)
        state.codes[:, self.plan.columns(unit)] = values
        state.fresh = values if unit < self.plan.n_units - 1 else None

    @torch.no_grad()
    def join(self, state: BlockState, condition: Tensor, codes: Tensor, unit: int) -> None:
        """Add rows with the blocks before `unit` behind them, in one masked pass."""
        self._settle(state)
        start, stop = len(state.codes), len(state.codes) + len(condition)
        fresh = state.memory.rows(start, stop)
        fresh.length = 0
        carry = self._prefill(fresh, condition, codes, self.plan.committed[unit])
        assert state.carry is not None
        state.condition, state.codes = torch.cat((state.condition, condition)), torch.cat((state.codes, codes))
        state.carry = torch.cat((state.carry, carry))
        state.calls += 1
        state.use_rows(stop)

    @torch.no_grad()
    def keep(self, state: BlockState, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        assert state.carry is not None
        state.condition, state.codes = state.condition[:rows], state.codes[:rows].clone()
        state.carry, state.fresh = state.carry[:rows], None if state.fresh is None else state.fresh[:rows]
        state.use_rows(rows)
