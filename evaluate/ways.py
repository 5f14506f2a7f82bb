"""Ways from a class to the tokens of an image: a teacher, what needs no training, and one-step students.

Shapes: `B` batch, `N` samples, `T` tokens of an image, `D` code width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import HELD_OUT, pair_noise
from ..errors import UserError
from ..models.distill.codebook import codebook_of
from ..models.distill.distilled import Ask
from ..models.generators.base import Generator
from ..models.open import OpenedDistilled
from ..models.samplers.decode import Tally, sample
from ..models.samplers.pick import uniforms

Way = Callable[[Tensor, range, Tally], Tensor]
"""Codes `[B, T]`, or vectors `[B, T, D]` that stand for them, of classes `[B]` and the numbers of the samples."""


class Frequencies:
    """How often each code occurs at each place in samples of each class: the best that one step does without dependence.

    Args:
        codes: `[N, T]` of a teacher.
        labels: `[N]`.
        num_classes: of the teacher.

    Raises:
        UserError: a class without samples.
    """

    def __init__(self, codes: Tensor, labels: Tensor, num_classes: int) -> None:
        self.counts = torch.bincount(labels, minlength=num_classes)
        if not self.counts.all():
            missing = int((self.counts == 0).nonzero()[0])
            raise UserError(f"no sample of class {missing} among {len(codes)}", where="count", fix="measure more samples")
        self.first = self.counts.cumsum(0) - self.counts
        self.codes = codes[labels.argsort(stable=True)]

    def draw(self, labels: Tensor, numbers: Tensor) -> Tensor:
        """Codes `[B, T]` by numbers `[B, T]` in [0, 1): each token is that of another sample of the class, whichever."""
        rows = self.first[labels, None] + (numbers * self.counts[labels, None]).long()
        return self.codes.gather(0, rows)


def teacher_way(teacher: Generator, sampling: Mapping[str, Any], seed: int) -> Way:
    """The teacher as it samples."""

    def way(labels: Tensor, ids: range, tally: Tally) -> Tensor:
        return sample(teacher, labels, seed=seed, sample_ids=torch.tensor(ids), tally=tally, **sampling)

    return way


def independent_way(frequencies: Frequencies, tokens: int, seed: int) -> Way:
    """Every token on its own: no network at all."""

    def way(labels: Tensor, ids: range, tally: Tally) -> Tensor:
        tally.add(0, 0)
        return frequencies.draw(labels, uniforms(seed, ids, tokens, labels.device))

    return way


def check_skip(teacher: Generator, units: int) -> None:
    """Make sure that something is skipped and something is left.

    Raises:
        UserError: it is not so.
    """
    last = teacher.plan.n_units - 1
    if not 0 < units <= last:
        raise UserError(f"{units} of {last + 1} units", where="skip", fix=f"skip 1 to {last}")


def skipping_way(teacher: Generator, frequencies: Frequencies, sampling: Mapping[str, Any], seed: int, units: int) -> Way:
    """The teacher stops before its last `units`; their tokens are drawn by frequency, which is better than to leave them out.

    Raises:
        UserError: see `check_skip`.
    """
    check_skip(teacher, units)
    plan, last = teacher.plan, teacher.plan.n_units - units
    drawn = torch.tensor(plan.revealed_at, device="cpu") < last

    def way(labels: Tensor, ids: range, tally: Tally) -> Tensor:
        codes = sample(teacher, labels, seed=seed, sample_ids=torch.tensor(ids), tally=tally, until=last, **sampling)
        guesses = frequencies.draw(labels, uniforms(seed, ids, plan.n_tokens, labels.device))
        return torch.where(drawn.to(codes.device), codes, guesses)

    return way


def distilled_way(opened: OpenedDistilled, seed: int, ask: Ask) -> Way:
    """What was distilled, from noise that none was trained on."""
    codebook, layout = codebook_of(opened.tokenizer), opened.tokenizer.layout.to_dict()

    def way(labels: Tensor, ids: range, tally: Tally) -> Tensor:
        noise = pair_noise(seed, range(HELD_OUT + ids.start, HELD_OUT + ids.stop), layout)
        return opened.model.draw(torch.from_numpy(noise).to(labels.device), labels, codebook, ask, torch.tensor(ids), tally)

    return way
