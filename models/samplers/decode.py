"""The one sampler: for every unit of the plan propose, guide, pick, fill, commit.

Shapes: `B` samples, `N` tokens of an image, `U` tokens of one unit, `V` vocabulary.
Guidance needs logits with and without the condition. Both halves share one batch (conditional rows first), but the second
half exists only while the schedule wants it: it joins the batch at the first guided unit (one pass over the tokens so far)
and leaves after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import UserError
from ..generators.base import Generator
from ..generators.plan import Plan
from .decoders import CachedDecoder, Decoder, UncachedDecoder
from .guidance import OFF, Varying, combine, parse_schedule
from .pick import pick, uniforms

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choices:
    """How logits become codes, one number for each unit.

    Args:
        scales: guidance scale `s`.
        temperatures: divide the logits.
        top_k: see `pick`.
        top_p: see `pick`.
        greedy: take the most likely token.
    """

    scales: Sequence[float]
    temperatures: Sequence[float]
    top_k: int
    top_p: float
    greedy: bool

    @cached_property
    def guided(self) -> list[bool]:
        """Whether each unit needs the unconditional half."""
        return [scale != OFF for scale in self.scales]

    @cached_property
    def last_guided(self) -> int:
        """The last unit that needs it, -1 when none does."""
        return max((unit for unit, guided in enumerate(self.guided) if guided), default=-1)


def choices_for(plan: Plan, guidance: Varying, temperature: Varying, top_k: int, top_p: float, greedy: bool) -> Choices:
    """How every unit of `plan` is drawn; see `sample`.

    Raises:
        UserError: a number out of range, an unknown schedule.
    """
    temperatures = parse_schedule(temperature, "temperature").over(plan)
    if min(temperatures) <= 0:
        raise UserError("must be positive", where="temperature", fix="use greedy for the most likely token")
    if top_k < 0:
        raise UserError(f"{top_k} is negative", where="top_k", fix="use 0 to keep all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"{top_p} is not in (0, 1]", where="top_p", fix="use 1 to keep all tokens")
    return Choices(parse_schedule(guidance).over(plan), temperatures, top_k, top_p, greedy)


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
        given: `[B, N]` codes that are fixed, -1 where a code is to be drawn (in- and out-painting).
        compile: run the decode step through `torch.compile`: worth it for many samples on a GPU.
        progress: called after every unit with tokens done and tokens in all.

    Returns:
        Codes `[B, N]` int64 in layout order, on the generator's device.

    Raises:
        UserError: a choice out of range, or a generator that gives NaN.
    """
    plan, total = generator.plan, len(condition) * generator.plan.n_tokens
    choices = choices_for(plan, guidance, temperature, top_k, top_p, greedy)
    ids = range(len(condition)) if sample_ids is None else sample_ids.tolist()
    _check_request(generator, condition, seed, ids, given)
    if max_batch is not None and max_batch < 1:
        raise UserError(f"{max_batch}", where="max_batch", fix="draw at least one sample at once")
    if not ids:
        return condition.new_zeros(0, plan.n_tokens, dtype=torch.int64)
    draws = uniforms(seed, ids, plan.n_tokens, condition.device)

    def run(rows: slice) -> Tensor:
        part = condition[rows]
        part = part if part.is_floating_point() else part.long()
        capacity = len(part) * (2 if any(choices.guided) else 1)
        decoder = CachedDecoder(generator, part, capacity, compile) if cache else UncachedDecoder(generator, part)
        fixed = None if given is None else given[rows].to(part.device)
        broken = torch.zeros((), dtype=torch.bool, device=part.device)
        for unit in range(plan.n_units):
            broken |= _reveal(decoder, plan, unit, choices, draws[rows], fixed)
            if progress is not None:
                progress(rows.start * plan.n_tokens + len(part) * plan.committed[unit + 1], total)
        if broken:  # asked once per chunk: a GPU would have to wait at every unit
            raise UserError("the generator's logits are not a number", fix="its weights diverged: use an earlier checkpoint")
        return decoder.codes

    training = generator.training
    generator.eval()
    try:
        return torch.cat(_in_chunks(len(condition), max_batch or len(condition), run))
    finally:
        generator.train(training)


def _reveal(decoder: Decoder, plan: Plan, unit: int, choices: Choices, draws: Tensor, given: Tensor | None) -> Tensor:
    """One unit: propose, guide, pick, fill, commit; says (bool, no axes) whether a logit was not a number."""
    columns = plan.columns(unit)
    if choices.guided[unit] and not decoder.paired:
        decoder.pair(unit)
    elif decoder.paired and unit > choices.last_guided:
        decoder.unpair()
    logits = decoder.propose(unit)
    if decoder.paired:
        conditional, unconditional = logits.chunk(2)
        logits = combine(conditional, unconditional, choices.scales[unit]) if choices.guided[unit] else conditional
    values = pick(
        logits,
        draws[:, columns],
        temperature=choices.temperatures[unit],
        top_k=choices.top_k,
        top_p=choices.top_p,
        greedy=choices.greedy,
    )
    if given is not None:
        values = torch.where(given[:, columns] >= 0, given[:, columns], values)
    decoder.commit(unit, values)
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
