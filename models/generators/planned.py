"""What all generators of one stream share: passes over the slots of a plan, the KV cache, the steps of generation.

Shapes: `B` batch, `N` tokens of an image, `S` slots, `L` slots of one pass, `U` tokens of one unit, `C` width, `V` vocabulary.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Context, KVCache
from .base import Generator
from .plan import Plan, block_mask, visible
from .static_step import compiled_step, static_step
from .transformer import Transformer, TransformerConfig


class Facts:
    """A tensor that follows from the plan, copied once to each device that asks.

    Not a buffer: a model built on the meta device would never get its values, and no checkpoint should hold it.
    """

    def __init__(self, value: Tensor) -> None:
        self._copies = {value.device: value}
        self._value = value

    def on(self, device: torch.device) -> Tensor:
        """The value there."""
        if device not in self._copies:
            with torch.inference_mode(False):  # kept for training, where a tensor born in inference mode is refused
                self._copies[device] = self._value.to(device)
        return self._copies[device]


@functools.lru_cache(maxsize=256)
def facts_of(plan: Plan) -> tuple[Facts, Facts]:
    """The mask `[S, S]` of a plan, and where each token of the layout stands in its order `[N]`; shared by all who ask."""
    return Facts(visible(plan)), Facts(torch.tensor(plan.perm, device="cpu").argsort())


@dataclass
class DecodeState:
    """A generation under way.

    Args:
        memory: the cache of all rows that may ever be used.
        cache: its rows in use.
        condition: of the rows in use, `[B, …]`.
        codes: `[B, N]` committed so far.
        carry: what a family keeps besides, row by row; `None`: nothing.
        compiled: run the repeated step through `torch.compile`.
        calls: passes of the network so far.
    """

    memory: KVCache
    cache: KVCache
    condition: Tensor
    codes: Tensor
    carry: Tensor | None = None
    compiled: bool = False
    calls: int = 0

    def use_rows(self, rows: int) -> None:
        """Put the first `rows` rows of the memory in use."""
        length = self.cache.length
        self.cache = self.memory.rows(0, rows)
        self.cache.length = length


class PlannedGenerator(Generator):
    """A transformer over the slots of a plan whose inputs never change once they are built (`append_on_propose`).

    A family says how slots are filled (`_fill`), what modulates them (`_modulation`) and how logits are read (`_head`).

    Args:
        plan: of one stream.
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more id stands for "no class".
        config: of the transformer.
        label_smoothing: of the cross-entropy.
    """

    def __init__(
        self, plan: Plan, vocab_size: int, num_classes: int, config: TransformerConfig, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.label_smoothing = label_smoothing
        self.transformer = Transformer(config)
        self._follow(plan)

    def _follow(self, plan: Plan) -> None:
        self.plan, self._mask, self._layout_order = plan, *facts_of(plan)

    @abstractmethod
    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        """Input embeddings `[B, L, C]` of consecutive slots, from codes `[B, N]` revealed before them.

        Args:
            codes: `[B, N]`; those not revealed before the last of the slots are not read.
            condition: `[B, …]`.
            slots: of the plan.
            carry: of the generation under way, all units before these slots in it; `None`: work from the codes alone.
        """

    @abstractmethod
    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Logits `[B, L, V]` of the tokens of units `first … last-1`, in order of `perm`, from hidden states of their slots."""

    def _modulation(self, condition: Tensor, slots: slice) -> Tensor | None:
        """What modulates the transformer at these slots, `[B, L or 1, C]`."""
        return None

    def _rope(self, slots: slice, device: torch.device) -> Tensor | None:
        """Rotary rows of these slots."""
        return None

    def _padding(self, condition: Tensor) -> Tensor | None:
        """Which prefix slots are to be seen, bool `[B, P]`; `None`: all."""
        return None

    def logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits `[B, N, V]` of codes `[B, N]`, position n for code n, by one masked pass."""
        hidden = self._masked_pass(codes.long(), condition, self.plan.n_slots)
        found = self._head(hidden, 0, self.plan.n_units)
        if self.plan.in_layout_order:
            return found
        return found[:, self._layout_order.on(found.device)]

    def features(self, values: Tensor, condition: Tensor) -> Tensor:
        """Hidden states `[B, N, C]` from which each token is predicted, in the order of the plan; the head is not asked.

        For families whose inputs may be vectors (next-scale, and next-token after `distill.adapt.continuous`) and that predict
        one token at a slot.

        Args:
            values: codes `[B, N]`, or vectors `[B, N, D]` in their place.
            condition: `[B, …]`.
        """
        return self._masked_pass(values, condition, self.plan.n_slots)[:, self.plan.prefix :]

    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, of float32 logits."""
        logits = self.logits(codes, condition).float()
        smoothing = self.label_smoothing if self.training else 0.0
        return {"loss": F.cross_entropy(logits.flatten(0, 1), codes.long().flatten(), label_smoothing=smoothing)}

    def recompute(self, codes: Tensor, condition: Tensor, unit: int) -> Tensor:
        """Logits `[B, U, V]` of `unit` by a masked pass over the slots up to it."""
        span = self.plan.span(unit)
        return self._head(self._masked_pass(codes.long(), condition, span.stop)[:, span], unit, unit + 1)

    @torch.no_grad()
    def begin(self, condition: Tensor, *, capacity: int | None = None, compile: bool = False) -> DecodeState:
        """Allocate the cache for `capacity` rows; nothing is computed yet."""
        rows, device = condition.shape[0], condition.device
        memory = make_cache(self.transformer, capacity or rows, self.plan.n_slots, device)
        codes = torch.zeros(rows, self.plan.n_tokens, dtype=torch.int64, device=device)
        return DecodeState(memory, memory.rows(0, rows), condition, codes, self._begin_carry(rows), compile)

    @torch.no_grad()
    def propose(self, state: DecodeState, unit: int) -> Tensor:
        """Logits `[B, U, V]` of the tokens of `unit`: its slots look at the cache and at each other.

        Slots before them that are not in the cache yet (see `resume`) are fed in the same pass.
        """
        span = self.plan.span(unit)
        behind = state.cache.length < span.start
        slots = slice(state.cache.length, span.stop) if behind else span
        x = self._fill(state.codes, state.condition, slots, None if behind else state.carry)
        if state.compiled and unit and not behind:
            hidden = self._static_pass(x, state.condition, span, state.cache, compiled_step())
        else:
            masked = behind or (unit == 0 and self.plan.prefix > 0)
            hidden = self._pass(x, state.condition, slots, state.cache, masked=masked)
        state.calls += 1
        return self._head(hidden[:, span.start - slots.start :], unit, unit + 1)

    @torch.no_grad()
    def resume(self, state: DecodeState, codes: Tensor, unit: int) -> None:
        """Take the units before `unit` as committed; nothing is computed until `unit` is proposed."""
        for earlier in range(unit):
            columns = self.plan.columns(earlier)
            state.codes[:, columns] = codes[:, columns]
            state.carry = self._advance(state.carry, earlier, codes[:, columns])

    @torch.no_grad()
    def commit(self, state: DecodeState, unit: int, values: Tensor) -> None:
        """Fix the codes `[B, U]` of `unit`; its slots stay in the cache."""
        state.codes[:, self.plan.columns(unit)] = values
        state.cache.length = self.plan.span(unit).stop
        state.carry = self._advance(state.carry, unit, values)

    @torch.no_grad()
    def join(self, state: DecodeState, condition: Tensor, codes: Tensor, unit: int) -> None:
        """Add rows with the units before `unit` behind them, in one masked pass."""
        start = state.codes.shape[0]
        stop = start + condition.shape[0]
        carry = self._begin_carry(condition.shape[0])
        if unit:
            fresh = state.memory.rows(start, stop)
            fresh.length = 0
            self._masked_pass(codes, condition, self.plan.span(unit).start, fresh)
            state.calls += 1
            for earlier in range(unit):
                carry = self._advance(carry, earlier, codes[:, self.plan.columns(earlier)])
        state.condition = torch.cat((state.condition, condition))
        state.codes = torch.cat((state.codes, codes))
        if state.carry is not None and carry is not None:
            state.carry = torch.cat((state.carry, carry))
        state.use_rows(stop)

    @torch.no_grad()
    def keep(self, state: DecodeState, rows: int) -> None:
        """Forget all but the first `rows` rows."""
        state.condition, state.codes = state.condition[:rows], state.codes[:rows].clone()
        state.carry = None if state.carry is None else state.carry[:rows]
        state.use_rows(rows)

    def _begin_carry(self, rows: int) -> Tensor | None:
        """What a family carries from unit to unit, `[rows, …]`, before the first."""
        return None

    def _advance(self, carry: Tensor | None, unit: int, values: Tensor) -> Tensor | None:
        """The carry with the codes `[B, U]` of `unit`."""
        return carry

    def _masked_pass(self, codes: Tensor, condition: Tensor, stop: int, cache: KVCache | None = None) -> Tensor:
        """Hidden states `[B, stop, C]` of the first slots, all known: training, prefill, or without a cache."""
        slots = slice(0, stop)
        return self._pass(self._fill(codes, condition, slots, None), condition, slots, cache, masked=True)

    def _pass(self, x: Tensor, condition: Tensor, slots: slice, cache: KVCache | None, masked: bool) -> Tensor:
        padding = self._padding(condition)
        causal = masked and self.plan.causal and padding is None
        mask = self._mask.on(x.device)[slots, : slots.stop] if masked and not causal else None
        if padding is not None:
            mask = _without_padding(mask, padding, slots)
        blocks = None
        if self.attention == "flex" and masked and padding is None and slots.start == 0:
            blocks = block_mask(self.plan, slots.stop, x.device)
        context = Context(self._rope(slots, x.device), causal, mask, cache, self.attention, blocks)
        return self._transform(x, context, self._modulation(condition, slots))

    def _static_pass(
        self, x: Tensor, condition: Tensor, slots: slice, cache: KVCache, step: Callable[..., Tensor] = static_step
    ) -> Tensor:
        """Hidden states of the slots of one unit by a step of fixed shapes: the twin of `_pass` behind a cache."""
        position = torch.arange(slots.start, slots.stop, device=x.device)
        seen = torch.arange(self.plan.n_slots, device=x.device)[None] < slots.stop
        if (padding := self._padding(condition)) is not None:
            seen = (seen & F.pad(padding, (0, self.plan.n_slots - padding.shape[1]), value=True))[:, None, None]
        rope = self._rope(slots, x.device)
        return step(
            self, x, None if rope is None else rope.contiguous(), position, seen, self._modulation(condition, slots), cache
        )

    def _transform(self, x: Tensor, context: Context, modulation: Tensor | None) -> Tensor:
        """Hidden states for `_head`, slots along the second axis."""
        return self.transformer(x, context, modulation)


def make_cache(transformer: Transformer, rows: int, slots: int, device: torch.device) -> KVCache:
    """An empty cache in the type in which `transformer` computes."""
    config, dtype = transformer.config, next(transformer.parameters()).dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return KVCache(config.layers, rows, config.heads, slots, config.head_dim, device=device, dtype=dtype)


def _without_padding(mask: Tensor | None, padding: Tensor, slots: slice) -> Tensor:
    """`mask [L, S]` (or none) for each sample, `[B, 1, L, S]`: no slot sees the padding, but every slot sees itself."""
    seen = F.pad(padding, (0, slots.stop - padding.shape[1]), value=True)[:, None, None]
    itself = torch.eye(slots.stop, dtype=torch.bool, device=padding.device)[slots]
    return (seen if mask is None else seen & mask) | itself
