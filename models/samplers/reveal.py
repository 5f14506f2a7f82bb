"""Within a unit: which of the tokens on offer are revealed at a step. Each strategy is a small function of the offer.

Shapes: `B` batch, `U` tokens of a unit or of a part of one, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError, nearest
from ..generators.base import Generator, StepwiseGenerator
from .guidance import Varying, parse_schedule


@dataclass(frozen=True)
class Offer:
    """A candidate for each token of a unit, at one step.

    Args:
        hidden: `[B, U]` bool, tokens that are not revealed yet.
        confidence: `[B, U]` probability of each candidate.
        entropy: `[B, U]` of each token's distribution, nats.
        noise: `[B, U]` in [0, 1), for strategies that draw.
        due: how many tokens the step must reveal at least.
        left: share of the steps that come after this one.
    """

    hidden: Tensor
    confidence: Tensor
    entropy: Tensor
    noise: Tensor
    due: int
    left: float

    def best(self, score: Tensor) -> Tensor:
        """The `due` hidden tokens of highest score, `[B, U]` bool."""
        rank = score.masked_fill(~self.hidden, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (rank < self.due) & self.hidden


class Within(TypedDict, total=False):
    """How the tokens of a unit are revealed, as a config says it; `None`: the strategy's own choice.

    Args:
        steps: steps in each unit (in each sub-block, where there are), a number or a schedule; `None`: one for each token.
        reveal: one of `STRATEGIES`; `None`: `confidence`.
        pace: `uniform`: about equally many at each step; `cosine`: few first, many last (MaskGIT's).
        threshold: confidence above which tokens are revealed.
        reveal_noise: scale of the Gumbel noise on log-confidence, annealed to 0.
        entropy_budget: nats.
        sub_block: tokens of the parts that are finished from first to last; `None`: the unit is one.
        sub_block_cache: within a part keep the keys and values of the rest of the unit as they were at its first step.
    """

    steps: Varying | None
    reveal: str | None
    pace: str | None
    threshold: float | None
    reveal_noise: float | None
    entropy_budget: float | None
    sub_block: int | None
    sub_block_cache: bool


@dataclass(frozen=True)
class Inner:
    """The same, complete and checked; `steps` for each unit, 0: one for each token."""

    steps: Sequence[int]
    reveal: str
    pace: str
    threshold: float
    reveal_noise: float
    entropy_budget: float
    sub_block: int
    sub_block_cache: bool

    def dues(self, unit: int, count: int) -> list[int]:
        """How many of `count` tokens each step of a part of `unit` reveals at least."""
        steps = min(self.steps[unit] or count, count)
        left = [_LEFT[self.pace]((step + 1) / steps) * count for step in range(steps)]
        done = [0]
        for step, rest in enumerate(left):
            done.append(min(max(count - math.floor(rest + 1e-9), done[-1] + 1), count - (steps - step - 1)))
        return [stop - start for start, stop in pairwise(done)]

    def parts(self, count: int) -> list[slice]:
        """The parts of a unit of `count` tokens, in order."""
        size = self.sub_block or count
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def choose(self, offer: Offer) -> Tensor:
        """Tokens to reveal now, `[B, U]` bool."""
        return STRATEGIES[self.reveal].choose(offer, self)


# Share of a unit that is hidden after a share of its steps.
_LEFT: dict[str, Callable[[float], float]] = {
    "uniform": lambda progress: 1 - progress,
    "cosine": lambda progress: math.cos(math.pi / 2 * progress),
}


def by_confidence(offer: Offer, inner: Inner) -> Tensor:
    """The most confident ones (SDAR's static)."""
    return offer.best(offer.confidence)


def by_threshold(offer: Offer, inner: Inner) -> Tensor:
    """All above the threshold, at least the most confident ones that are due (SDAR's dynamic, Fast-dLLM)."""
    return offer.best(offer.confidence) | (offer.hidden & (offer.confidence > inner.threshold))


def by_maskgit(offer: Offer, inner: Inner) -> Tensor:
    """The most confident ones after Gumbel noise on the logarithm, which fades out (MaskGIT)."""
    gumbel = -(-offer.noise.clamp(1e-9, 1 - 1e-7).log()).log()
    return offer.best(offer.confidence.clamp_min(1e-30).log() + inner.reveal_noise * offer.left * gumbel)


def by_first_hitting(offer: Offer, inner: Inner) -> Tensor:
    """Any, by chance: the order in which the reverse diffusion reveals them, without its idle steps (BD3-LM's sampler)."""
    return offer.best(offer.noise)


def by_entropy(offer: Offer, inner: Inner) -> Tensor:
    """Surest first, while the entropies of those before stay within the budget in sum (EB-Sampler, arXiv:2505.24857)."""
    ordered, order = offer.entropy.masked_fill(~offer.hidden, torch.inf).sort(dim=1, stable=True)
    before = ordered.nan_to_num(posinf=0.0).cumsum(dim=1) - ordered.nan_to_num(posinf=0.0)
    within = torch.zeros_like(offer.hidden).scatter(1, order, before <= inner.entropy_budget)
    return offer.best(-offer.entropy) | (offer.hidden & within)


def by_adaptive(offer: Offer, inner: Inner) -> Tensor:
    """Within the run of hidden tokens up to which the entropy does not rise by more than the budget: as `by_threshold`.

    AdaBlock's blocks (arXiv:2509.26432) end where confidence gives way; codes have no delimiters, so entropy alone decides,
    averaged over three tokens and compared with that of the first hidden one.
    """
    padded = F.pad(offer.entropy[:, None], (1, 1), mode="replicate")
    smooth = F.avg_pool1d(padded, 3, stride=1)[:, 0]
    first = offer.hidden.int().argmax(dim=1, keepdim=True)
    place = torch.arange(smooth.shape[1], device=smooth.device)
    rises = (smooth - smooth.gather(1, first) > inner.entropy_budget) & (place > first)
    run = offer.hidden & (rises.int().cumsum(dim=1) == 0)
    within = Offer(run, offer.confidence, offer.entropy, offer.noise, 1, offer.left)
    behind = offer.best(offer.confidence) if offer.due > 1 else torch.zeros_like(run)
    return by_threshold(within, inner) | behind


@dataclass(frozen=True)
class Strategy:
    """A way to choose, and the settings it reads."""

    choose: Callable[[Offer, Inner], Tensor]
    reads: tuple[str, ...] = ()
    pace: str = "uniform"


STRATEGIES = {
    "confidence": Strategy(by_confidence),
    "threshold": Strategy(by_threshold, ("threshold",)),
    "maskgit": Strategy(by_maskgit, ("reveal_noise",), "cosine"),
    "first_hitting": Strategy(by_first_hitting),
    "entropy": Strategy(by_entropy, ("entropy_budget",)),
    "adaptive": Strategy(by_adaptive, ("threshold", "entropy_budget")),
}
# SDAR's and Fast-dLLM's threshold, MaskGIT's noise, SDAR's budget.
_DEFAULTS = {"threshold": 0.9, "reveal_noise": 4.5, "entropy_budget": 0.35}


def inner_for(generator: Generator, within: Within) -> Inner | None:
    """How every unit of `generator` is revealed; `None` for a generator that reveals a unit at once.

    Raises:
        UserError: settings that this generator or the strategy does not read, or out of range.
    """
    if not isinstance(generator, StepwiseGenerator):
        for key, value in within.items():
            if value is not None and value is not False:
                raise UserError(
                    f"a {type(generator).__name__} reveals a unit in one step",
                    where=key,
                    fix="leave it null, or take a generator of blocks",
                )
        return None
    kind = within.get("reveal") or "confidence"
    if kind not in STRATEGIES:
        raise UserError(f"no strategy {kind!r}", where="reveal", fix=nearest(kind, STRATEGIES))
    pace = within.get("pace") or STRATEGIES[kind].pace
    if pace not in _LEFT:
        raise UserError(f"no pace {pace!r}", where="pace", fix=nearest(pace, _LEFT))
    sub_block, keep = within.get("sub_block") or 0, within.get("sub_block_cache", False)
    if sub_block < 0:
        raise UserError(f"{sub_block} is negative", where="sub_block", fix="leave it null for whole blocks")
    if keep and not sub_block:
        raise UserError("there are no sub-blocks", where="sub_block_cache", fix="set sub_block, e.g. 8")
    given = {key: value for key, value in within.items() if key in _DEFAULTS and value is not None}
    return Inner(
        _steps(generator, within.get("steps")),
        kind,
        pace,
        threshold=_number_for(kind, "threshold", given),
        reveal_noise=_number_for(kind, "reveal_noise", given),
        entropy_budget=_number_for(kind, "entropy_budget", given),
        sub_block=sub_block,
        sub_block_cache=keep,
    )


def _number_for(kind: str, key: str, given: Mapping[str, object]) -> float:
    """The setting `key` of a strategy, as given or by default."""
    value = given.get(key, _DEFAULTS[key])
    if key in given and key not in STRATEGIES[kind].reads:
        users = [name for name, other in STRATEGIES.items() if key in other.reads]
        raise UserError(f"reveal={kind} does not read it", where=key, fix=f"leave it null, or set reveal={users[0]}")
    if not isinstance(value, int | float) or value < 0:
        raise UserError(f"{value!r} is negative or no number", where=key, fix="use a number from 0 on")
    return float(value)


def _steps(generator: Generator, steps: Varying | None) -> list[int]:
    """Steps of each unit."""
    if steps is None:
        return [0] * generator.plan.n_units
    numbers = [round(number) for number in parse_schedule(steps, "steps").over(generator.plan)]
    if min(numbers) < 1:
        raise UserError(f"{min(numbers)} steps", where="steps", fix="use 1 or more, or null for one step a token")
    return numbers


def offer_of(logits: Tensor, values: Tensor, hidden: Tensor, noise: Tensor, temperature: float, due: int, left: float) -> Offer:
    """The offer of candidates `values` `[B, U]`, drawn from `logits` `[B, U, V]`."""
    log_probability = (logits.float() / temperature).log_softmax(dim=-1)
    confidence = log_probability.gather(-1, values[..., None])[..., 0].exp()
    entropy = -(log_probability.exp() * log_probability).sum(-1)
    return Offer(hidden, confidence, entropy, noise, due, left)
