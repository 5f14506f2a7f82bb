"""Block diffusion on codes: BD3-LM (arXiv:2503.09573), SDAR (arXiv:2510.06303), Fast-dLLM v2 (arXiv:2509.26328).

Blocks follow one another as tokens do in a next-token model; within a block tokens are hidden and revealed in any order.
Shapes: `B` batch, `N` tokens of an image in the order of their blocks, `U` tokens of a block, `L` slots of one pass, `C` width,
`V` vocabulary. Slots: `N` noisy ones (a code, or the mask with id `V`), then the class, then `N` clean ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from ..attention import Context, KVCache, rope_table
from ..layers import init_normal
from .base import StepwiseGenerator
from .block_plan import block_plan
from .masking import LEAST, BlockMask, block_sizes, calmest_window, window_moments
from .next_token import QK_EPS, NextToken
from .plan import block_mask, visible
from .planned import DecodeState, Facts, make_cache
from .transformer import Transformer, TransformerConfig


class BlockDiffusion(StepwiseGenerator):
    """Masked diffusion within blocks, one block after the other, on LlamaGen's transformer.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grid: rows and columns of the tokens.
        n_tokens: number of tokens of a 1-D or multi-scale tokenizer.
        grids: of the scales of a multi-scale tokenizer.
        block: `chunks` of tokens in a row, whole `rows` of the grid, square `tiles` of it, or `scales`.
        block_size: tokens of a chunk, rows of a block, side of a tile; scales have their own sizes.
        dim: width `C`.
        layers: number of transformer blocks.
        heads: attention heads.
        positions: see `NextToken`; both streams share them.
        qk_norm: LayerNorm of each head's queries and keys.
        modulation: adaptive layer norm by the class besides its slot.
        multiple_of: see `NextToken`.
        shift: a slot predicts the next token of its block, and the clean slot before a block its first (after Fast-dLLM v2):
            what a next-token model does, so that one converts without loss. Else each predicts its own (BD3-LM, SDAR).
        weight: of the loss of a hidden token: `elbo` 1/t, or `mean`, the same for all (Fast-dLLM v2, MaskGIT).
        level: t drawn for each `block` (BD3-LM) or once for each `sample` (SDAR).
        window: t is uniform on it (BD3-LM's clipped schedule).
        adapt_window: at each validation take the window in which the losses of blocks vary least.
        complementary: train on the mask and on its complement, so that every token is predicted once; needs weight `mean`.
        token_dropout: rate on the input embeddings.
        resid_dropout: rate after each attention.
        ffn_dropout: rate after each feed-forward.
        drop_path: stochastic depth of the last transformer block, growing linearly from 0 at the first.

    Raises:
        ValueError: arguments that contradict each other, or blocks that do not fit the tokens.
    """

    exact = False
    window: Tensor

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        n_tokens: PositiveInt | None = None,
        grids: Sequence[Sequence[PositiveInt]] | None = None,
        block: Literal["chunks", "rows", "tiles", "scales"] = "chunks",
        block_size: PositiveInt = 4,
        dim: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        positions: Literal["rotary", "rotary_class", "learned"] = "rotary",
        qk_norm: bool = False,
        modulation: Literal["none", "block", "shared"] = "none",
        multiple_of: PositiveInt = 256,
        shift: bool = False,
        weight: Literal["elbo", "mean"] = "elbo",
        level: Literal["block", "sample"] = "block",
        window: tuple[Fraction, Fraction] = (0.001, 1.0),
        adapt_window: bool = False,
        complementary: bool = False,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
        drop_path: Fraction = 0.0,
    ) -> None:
        low, high = window
        if not low <= high or not high:
            raise ValueError(f"a window from {low} to {high} is empty; give its lower end first")
        if complementary and weight != "mean":
            raise ValueError("complementary masks hide every token once, whatever t is; set weight to mean")
        super().__init__()
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.plan = block_plan(grid, n_tokens, grids, block, block_size)
        self.shift, self.weight, self.level = shift, weight, level
        self.adapt_window, self.complementary, self.token_dropout = adapt_window, complementary, token_dropout
        self.transformer = Transformer(
            TransformerConfig(
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
        )
        self.classes = nn.Embedding(num_classes + 1, dim)
        self.tokens = nn.Embedding(vocab_size + 1, dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        slots = 1 + self.plan.n_tokens
        self.positions = nn.Parameter(torch.randn(slots, dim) * dim**-0.5) if positions == "learned" else None
        self.register_buffer("window", torch.tensor([max(low, LEAST), max(high, LEAST)]))
        self._init_weights()
        self._blocks = BlockMask(block_sizes(self.plan.committed))
        self.noise_size = self._blocks.noise_size
        self._moments: Tensor | None = None
        self._lay_out(positions, dim // heads)

    def _init_weights(self) -> None:
        """Small normals; the head and adaptive layer norms begin as none (LlamaGen's, GigaTok's)."""
        init_normal(self)
        layers = [part.modulation for part in self.transformer.blocks]
        for zeroed in (self.head, *layers, self.transformer.shared, self.transformer.final):
            if isinstance(zeroed, nn.Module):
                for parameter in zeroed.parameters():
                    nn.init.zeros_(parameter)

    def _lay_out(self, positions: str, head_dim: int) -> None:
        """What follows from the plan alone: orders, places, and which slot predicts each token."""
        perm, count, starts = self.plan.perm, self.plan.n_tokens, set(self.plan.committed)
        rows = [1 + token for token in perm]
        self._mask = Facts(visible(self.plan))
        self._order = Facts(torch.tensor(perm, device="cpu"))
        self._layout_order = Facts(torch.tensor(perm, device="cpu").argsort())
        self._place = Facts(torch.tensor([*rows, 0, *rows], device="cpu"))
        predictor = [count + index if index in starts else index - 1 for index in range(count)]
        self._predictor = Facts(torch.tensor(predictor if self.shift else range(count), device="cpu"))
        coords = [(row,) for row in (*rows, 0, *rows)] if positions == "rotary_class" else self.plan.coords
        self._rotary = None if positions == "learned" else Facts(rope_table(coords, head_dim))

    @property
    def mask_id(self) -> int:
        """The row of the token table that stands for a hidden token."""
        return self.vocab_size

    def weights_from(self, model: nn.Module) -> dict[str, Tensor]:
        """Those of a block diffusion, or of a next-token model over the same tokens: the mask becomes the mean token."""
        weights = dict(model.state_dict())
        if isinstance(model, NextToken):
            weights["tokens.weight"] = torch.cat((weights["tokens.weight"], weights["tokens.weight"].mean(0, keepdim=True)))
        return weights | {"window": self.window.detach().clone()}

    # ---- training and likelihood

    def _denoise(self, codes: Tensor, hidden: Tensor, condition: Tensor) -> Tensor:
        """Cross-entropy `[B, N]` of codes `[B, N]` with some hidden (bool), both in order of the blocks; of the others too."""
        states = self._both_streams(codes, hidden, condition)
        return F.cross_entropy(self.head(states).float().transpose(1, 2), codes, reduction="none")

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

    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """In training the objective; else the bound of the negative log-likelihood, in nats per token."""
        noise = self._noise(codes) if noise is None else noise
        if not self.training:
            if self.adapt_window:
                self._observe(codes, condition, noise)
            return {"loss": self.token_nll(codes, condition, noise).mean()}
        self._moments = None  # those of the validation before
        ordered, levels = codes.long()[:, self._order.on(codes.device)], self._levels(noise)
        hidden = self._blocks.by_level(levels, noise)
        rate: Tensor | float = self.window.mean() if self.weight == "mean" else levels[:, self._blocks.of(codes.device)]
        if self.complementary:
            ordered, condition, hidden = ordered.repeat(2, 1), condition.repeat(2), torch.cat((hidden, ~hidden))
            rate = 0.5
        # By the expected share of hidden tokens, not the drawn one: then the mean over a batch is that over its parts.
        return {"loss": (self._denoise(ordered, hidden, condition) * hidden / rate).mean()}

    def token_nll(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of the bound `[B, N]`, nats: of each block m tokens are hidden and weigh k/m (see `BlockMask.by_count`)."""
        ordered = codes.long()[:, self._order.on(codes.device)]
        hidden, weight = self._blocks.by_count(self._noise(codes) if noise is None else noise)
        nll = self._denoise(ordered, hidden, condition) * hidden * weight
        return nll[:, self._layout_order.on(codes.device)]

    def _noise(self, codes: Tensor) -> Tensor:
        return torch.rand(len(codes), self.noise_size, device=codes.device)

    def _levels(self, noise: Tensor) -> Tensor:
        """t of each block, `[B, K]`, within the window."""
        drawn = noise[:, :1].expand(-1, self._blocks.count) if self.level == "sample" else self._blocks.spread(noise)
        low, high = self.window
        return low + (high - low) * drawn

    @torch.no_grad()
    def _observe(self, codes: Tensor, condition: Tensor, noise: Tensor) -> None:
        """Choose the window by the losses of the blocks of this validation so far."""
        ordered = codes.long()[:, self._order.on(codes.device)]
        levels = LEAST + (1 - LEAST) * self._blocks.spread(noise)
        hidden = self._blocks.by_level(levels, noise)
        nll = self._blocks.sums(self._denoise(ordered, hidden, condition) * hidden) / levels
        moments = window_moments(levels, nll / self._blocks.sums(torch.ones_like(noise[:, : ordered.shape[1]])))
        self._moments = moments if self._moments is None else self._moments + moments
        self.window.copy_(calmest_window(self._moments))

    # ---- slots

    def _embed(self, ids: Tensor, slots: slice) -> Tensor:
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
        signal = None if self.transformer.final is None else self._prefix(condition)
        whole = slots == slice(0, self.plan.n_slots)
        flex = block_mask(self.plan, slots.stop, x.device) if self.attention == "flex" and whole else None
        return self.transformer(x, Context(rope, False, mask, cache, self.attention, flex), signal)

    # ---- generation: the cache holds the class and the clean slots of committed blocks

    @torch.no_grad()
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> DecodeState:
        """Allocate the cache for `capacity` rows and put the class into it.

        Raises:
            UserError: a compiled step is asked for.
        """
        self.check_compile(compile)
        rows, count = len(condition), self.plan.n_tokens
        memory = make_cache(self.transformer, capacity or rows, 1 + count, condition.device)
        codes = torch.zeros(rows, count, dtype=torch.int64, device=condition.device)
        state = DecodeState(memory, memory.rows(0, rows), condition, codes)
        state.carry = self._prefill(state.cache, condition, codes, 0)
        state.calls += 1
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
    def propose(self, state: DecodeState, unit: int) -> Tensor:
        """Logits `[B, U, V]` of a block of which nothing is known."""
        return self.refine(state, unit, state.codes.new_full((len(state.codes), len(self.plan.tokens(unit))), -1))

    @torch.no_grad()
    def refine(self, state: DecodeState, unit: int, filled: Tensor, window: slice | None = None) -> Tensor:
        """Logits of a block, partly `filled`: noisy slots look at the cache and at each other, and leave no trace in it."""
        start, size = self.plan.committed[unit], filled.shape[1]
        first, last = (0, size) if window is None else (window.start, window.stop)
        begin = max(first - self.shift, 0)
        assert state.carry is not None
        before = [state.carry[:, None]] if self.shift and first == 0 else []
        if self.shift and last == 1:  # the clean slot before it tells all
            return self.head(before[0])
        slots = slice(start + begin, start + last)
        ids = filled[:, begin:last]
        cache = state.cache
        mask = None
        if window is not None:  # over the part's last keys; those of the rest of the block stay behind the final ones
            cache.position = torch.arange(cache.length + begin, cache.length + last, device=ids.device)
            mask = torch.arange(cache.keys.shape[3], device=ids.device)[None] < cache.length + size
        states = self._pass(self._embed(ids.masked_fill(ids < 0, self.mask_id), slots), state.condition, slots, cache, mask)
        cache.position = None
        state.calls += 1
        return self.head(torch.cat((*before, states[:, : -1 if self.shift else None]), dim=1))

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
    def commit(self, state: DecodeState, unit: int, values: Tensor) -> None:
        """Fix the codes `[B, U]` of a block: a clean pass puts it into the cache, after the last block none."""
        state.codes[:, self.plan.columns(unit)] = values
        if unit == self.plan.n_units - 1:
            return
        first = self.plan.n_tokens + 1
        slots = slice(first + self.plan.committed[unit], first + self.plan.committed[unit + 1])
        state.carry = self._pass(self._embed(values, slots), state.condition, slots, state.cache)[:, -1]
        state.cache.length += values.shape[1]
        state.calls += 1

    @torch.no_grad()
    def join(self, state: DecodeState, condition: Tensor, codes: Tensor, unit: int) -> None:
        """Add rows with the blocks before `unit` behind them, in one masked pass."""
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
    def keep(self, state: DecodeState, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        assert state.carry is not None
        state.condition, state.codes = state.condition[:rows], state.codes[:rows].clone()
        state.carry = state.carry[:rows]
        state.use_rows(rows)
