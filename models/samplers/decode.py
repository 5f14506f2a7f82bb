"""The one sampler: for every unit of the plan, for every step within it, propose, guide, pick, fill; then commit.

Shapes: `B` samples, `N` tokens of an image, `U` tokens of one unit, `V` vocabulary.
Guidance needs logits with and without the condition. Both halves share one batch (conditional rows first), but the second
half exists only while the schedule wants it: it joins the batch at the first guided unit (one pass over the tokens so far)
and leaves after the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Unpack

import torch
from torch import Tensor

from ...errors import UserError
from ..generators.base import Generator
from ..generators.plan import Plan
from .decoders import CachedDecoder, Decoder, UncachedDecoder
from .guidance import OFF, Varying, combine, parse_schedule
from .pick import Numbers, pick, temper
from .reveal import Inner, Within, inner_for, offer_of

Progress = Callable[[int, int], None]
Transport = Callable[[Tensor, slice, slice | list[int]], Tensor]
"""Codes `[B, U]` in the place of a draw, from tempered logits `[B, U, V]`, rows of the request, and tokens of the image."""


@dataclass(frozen=True)
class Choices:
    """How logits become codes, one number for each unit.

    Args:
        scales: guidance scale `s`.
        temperatures: divide the logits.
        top_k: see `pick`.
        top_p: see `pick`.
        greedy: take the most likely token.
        inner: how a unit is revealed in several steps; `None`: in one.
    """

    scales: Sequence[float]
    temperatures: Sequence[float]
    top_k: int
    top_p: float
    greedy: bool
    inner: Inner | None = None

    @cached_property
    def guided(self) -> list[bool]:
        """Whether each unit needs the unconditional half."""
        return [scale != OFF for scale in self.scales]

    @cached_property
    def last_guided(self) -> int:
        """The last unit that needs it, -1 when none does."""
        return max((unit for unit, guided in enumerate(self.guided) if guided), default=-1)

    def pick(self, logits: Tensor, numbers: Tensor, unit: int) -> Tensor:
        """Codes `[B, U]` of `unit` from guided logits and one number for each."""
        temperature = self.temperatures[unit]
        return pick(logits, numbers, temperature=temperature, top_k=self.top_k, top_p=self.top_p, greedy=self.greedy)

    def temper(self, logits: Tensor, unit: int) -> Tensor:
        """Guided logits `[B, U, V]` of `unit` as those that codes are drawn from."""
        return temper(logits, self.temperatures[unit], self.top_k, self.top_p)


@dataclass
class Tally:
    """What sampling cost.

    Args:
        calls: passes of the network over a batch.
        batches: batches drawn.
        evaluations: the same passes, those with and without the condition counted as two.
        depth: what has to happen one after the other: passes, and those of a small head within them.
    """

    calls: int = 0
    batches: int = 0
    evaluations: int = 0
    depth: int = 0

    def add(self, calls: int, evaluations: int, depth: int | None = None) -> None:
        """Count one batch; its depth is its calls, where it is not said."""
        self.calls, self.evaluations, self.batches = self.calls + calls, self.evaluations + evaluations, self.batches + 1
        self.depth += calls if depth is None else depth

    @property
    def calls_per_image(self) -> float:
        """Passes that an image took part in."""
        return self.calls / max(self.batches, 1)

    @property
    def per_image(self) -> dict[str, float]:
        """What an image took, by the names of metrics."""
        found = {"network_calls": self.calls, "evaluations": self.evaluations, "depth": self.depth}
        return {name: count / max(self.batches, 1) for name, count in found.items()}


def choices_for(
    generator: Generator,
    *,
    guidance: Varying = OFF,
    temperature: Varying = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    **within: Unpack[Within],
) -> Choices:
    """How every unit of `generator` is drawn; see `sample`.

    Raises:
        UserError: a number out of range, an unknown schedule.
    """
    plan, temperatures = generator.plan, parse_schedule(temperature, "temperature").over(generator.plan)
    if min(temperatures) <= 0:
        raise UserError("must be positive", where="temperature", fix="use greedy for the most likely token")
    if top_k < 0:
        raise UserError(f"{top_k} is negative", where="top_k", fix="use 0 to keep all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"{top_p} is not in (0, 1]", where="top_p", fix="use 1 to keep all tokens")
    inner = inner_for(generator, within)
    return Choices(parse_schedule(guidance).over(plan), temperatures, top_k, top_p, greedy, inner)


def _check_request(generator: Generator, condition: Tensor, seed: int, ids: Sequence[int], given: Tensor | None) -> None:
    generator.check_condition(condition)
    if seed < 0 or min(ids, default=0) < 0:
        raise UserError("negative", where="seed or sample_ids", fix="use numbers from 0 on")
    if len(ids) != len(condition):
        raise UserError(f"{len(ids)} ids for {len(condition)} samples", where="sample_ids", fix="give one id for each sample")
    if given is not None and given.shape != (len(condition), generator.plan.n_tokens):
        raise UserError(
            f"shape {tuple(given.shape)}", where="given", fix=f"give [{len(condition)}, {generator.plan.n_tokens}] codes"
        )
    if given is not None and given.numel() and int(given.max()) >= generator.vocab_size:
        raise UserError(
            f"code {int(given.max())}", where="given", fix=f"codes end at {generator.vocab_size - 1}; -1 is to be drawn"
        )


@torch.inference_mode()
def sample(
    generator: Generator,
    condition: Tensor,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    guidance: Varying = OFF,
    temperature: Varying = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    cache: bool = True,
    max_batch: int | None = None,
    given: Tensor | None = None,
    compile: bool = False,
    progress: Progress | None = None,
    tally: Tally | None = None,
    transport: Transport | None = None,
    until: int | None = None,
    **within: Unpack[Within],
) -> Tensor:
    """Draw codes from a generator.

    Sample `i` depends on `seed`, its id, its condition and the choices below, not on the batch it is drawn in.

    Args:
        generator: any; put in eval mode meanwhile.
        condition: `[B, …]`, on the generator's device: class ids, or what a generator of texts reads.
        seed: not negative.
        sample_ids: `[B]` ids, not negative; `0 … B-1` when not given.
        guidance: scale `s` in `u + s·(c - u)`, a number or a schedule (see `parse_schedule`); 1: none.
        temperature: divides the logits, a number or a schedule.
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the most likely tokens up to this total probability; 1: all.
        greedy: take the most likely token instead of drawing.
        cache: use the KV cache; without it every unit is a full pass.
        max_batch: draw at most this many samples at once. On a GPU that runs out of memory it is halved until it fits.
        given: `[B, N]` codes that are fixed, -1 where a code is to be drawn (in- and out-painting); `[1, N]`: of all samples.
            Units that are given from the first on cost no steps.
        compile: run the decode step through `torch.compile`: worth it for many samples on a GPU.
        progress: called after every unit with tokens done and tokens in all.
        tally: is told what it cost.
        transport: chooses the codes instead of a draw; `seed` is then not used.
        until: stop before this unit; later codes are 0.
        within: how a generator of blocks reveals one; see `Within`.

    Returns:
        Codes `[B, N]` int64 in layout order, on the generator's device.

    Raises:
        UserError: a choice out of range, or a generator that gives NaN.
    """
    choices = choices_for(
        generator, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, **within
    )
    if choices.inner and choices.inner.sub_block_cache and not cache:
        raise UserError(
            "without a cache there is none of sub-blocks", where="sub_block_cache", fix="set it false, or cache true"
        )
    ids = range(len(condition)) if sample_ids is None else sample_ids.tolist()
    if given is not None and len(given) == 1:
        given = given.expand(len(condition), -1)
    _check_request(generator, condition, seed, ids, given)
    if max_batch is not None and max_batch < 1:
        raise UserError(f"{max_batch}", where="max_batch", fix="draw at least one sample at once")
    if not ids:
        return condition.new_zeros(0, generator.plan.n_tokens, dtype=torch.int64)
    last = generator.plan.n_units if until is None else until
    request = _Request(generator, condition, choices, seed, ids, given, cache, compile, last, transport, progress, tally)
    training = generator.training
    generator.eval()
    try:
        return torch.cat(_in_chunks(len(condition), max_batch or len(condition), request.draw))
    finally:
        generator.train(training)


@dataclass(frozen=True)
class _Request:
    """What `sample` was asked for, of which rows can be drawn in any order."""

    generator: Generator
    condition: Tensor
    choices: Choices
    seed: int
    ids: Sequence[int]
    given: Tensor | None
    cache: bool
    compile: bool
    last: int
    transport: Transport | None
    progress: Progress | None
    tally: Tally | None

    def draw(self, rows: slice) -> Tensor:
        """Codes `[b, N]` of these rows."""
        plan, decoder = self.generator.plan, self._decoder(rows)
        fixed = None if self.given is None else self.given[rows].to(decoder.codes.device)
        numbers = Numbers(self.seed, self.ids[rows], plan.n_tokens, decoder.codes.device)
        source = None if self.transport is None else functools.partial(_carry, self.transport, rows)
        broken = torch.zeros((), dtype=torch.bool, device=decoder.codes.device)
        first = 0 if fixed is None or self.choices.inner else _given_units(plan, fixed)
        if fixed is not None and first:
            decoder.resume(fixed, first)
        doubled = 0
        for unit in range(first, self.last):
            _pair(decoder, unit, self.choices)
            before = decoder.calls
            broken |= _reveal(decoder, plan, unit, self.choices, numbers, fixed, source)
            doubled += decoder.calls - before if decoder.paired else 0
            if self.progress is not None:
                done = rows.start * plan.n_tokens + len(decoder.codes) * plan.committed[unit + 1]
                self.progress(done, len(self.condition) * plan.n_tokens)
        if broken:  # asked once per chunk: a GPU would have to wait at every unit
            raise UserError("the generator's logits are not a number", fix="its weights diverged: use an earlier checkpoint")
        if self.tally is not None:
            self.tally.add(decoder.calls, decoder.calls + doubled)
        return decoder.codes

    def _decoder(self, rows: slice) -> Decoder:
        part = self.condition[rows]
        part = part if part.is_floating_point() else part.long()
        if not self.cache:
            return UncachedDecoder(self.generator, part)
        return CachedDecoder(self.generator, part, len(part) * (2 if any(self.choices.guided) else 1), self.compile)


def _pair(decoder: Decoder, unit: int, choices: Choices) -> None:
    """The unconditional half comes when it is wanted, and leaves when it is not any more."""
    if choices.guided[unit] and not decoder.paired:
        decoder.pair(unit)
    elif decoder.paired and unit > choices.last_guided:
        decoder.unpair()


Source = Callable[[Tensor, slice | list[int]], Tensor]


def _carry(transport: Transport, rows: slice, logits: Tensor, columns: slice | list[int]) -> Tensor:
    return transport(logits, rows, columns)


def _given_units(plan: Plan, given: Tensor) -> int:
    """How many units from the first on are given in all rows of `[B, N]`."""
    known = (given >= 0).all(dim=0)
    return next((unit for unit in range(plan.n_units) if not known[plan.columns(unit)].all()), plan.n_units)


def _reveal(
    decoder: Decoder, plan: Plan, unit: int, choices: Choices, numbers: Numbers, given: Tensor | None, source: Source | None
) -> Tensor:
    """One unit, in one step or in several, then its commit; says (bool, no axes) whether a logit was not a number."""
    columns = plan.columns(unit)
    fixed = None if given is None else given[:, columns]
    if choices.inner is None:
        logits = _guided(decoder, decoder.propose(unit), unit, choices)
        broken = _is_broken(logits)
        if source is None:
            values = choices.pick(logits, numbers.of_tokens(columns), unit)
        else:
            values = source(choices.temper(logits, unit), columns)
        values = values if fixed is None else torch.where(fixed >= 0, fixed, values)
    else:
        hidden = decoder.codes.new_full((len(decoder.codes), len(plan.tokens(unit))), -1)
        values = hidden if fixed is None else fixed.clone()
        broken = _fill(decoder, unit, choices, choices.inner, numbers, values)
    decoder.commit(unit, values)
    return broken


def _fill(decoder: Decoder, unit: int, choices: Choices, inner: Inner, numbers: Numbers, values: Tensor) -> Tensor:
    """Fill the hidden (-1) ones of `values [B, U]` part by part, step by step; says whether a logit was not a number."""
    broken = torch.zeros((), dtype=torch.bool, device=values.device)
    for part in inner.parts(values.shape[1]):
        dues = inner.dues(unit, part.stop - part.start)
        # All at once: how many steps there really are depends on the other rows of the batch.
        drawn = numbers.take(len(dues), 2, part.stop - part.start)
        for step, due in enumerate(dues):
            hidden = values[:, part] < 0
            if not hidden.any():
                break
            alone = inner.sub_block_cache and step > 0
            logits = decoder.refine(unit, values, part if alone else None)
            logits = _guided(decoder, logits if alone else logits[:, part], unit, choices)
            candidates, left = choices.pick(logits, drawn[:, step, 0], unit), 1 - (step + 1) / len(dues)
            offer = offer_of(logits, candidates, hidden, drawn[:, step, 1], choices.temperatures[unit], due, left)
            values[:, part] = torch.where(inner.choose(offer), candidates, values[:, part])
            broken |= _is_broken(logits)
    return broken


def _guided(decoder: Decoder, logits: Tensor, unit: int, choices: Choices) -> Tensor:
    """The conditional half, guided by the other where the schedule wants it."""
    if not decoder.paired:
        return logits
    conditional, unconditional = logits.chunk(2)
    return combine(conditional, unconditional, choices.scales[unit]) if choices.guided[unit] else conditional


def _is_broken(logits: Tensor) -> Tensor:
    # One column tells: a hidden state that is not a number spoils every logit.
    return logits[..., 0].isnan().any()


def _in_chunks(count: int, size: int, run: Callable[[slice], Tensor]) -> list[Tensor]:
    """Run over `0 … count-1` in slices of `size`, halved whenever a GPU is out of memory."""
    parts, done = [], 0
    while done < count:
        try:
            parts.append(run(slice(done, min(done + size, count))))
            done += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
    return parts
