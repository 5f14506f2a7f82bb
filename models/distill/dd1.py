"""Distilled Decoding 1 (arXiv:2412.17153): the losses of a student on trajectories, and its samplers.

Shapes: `B` batch, `N` tokens of an image, `D` code width, `V` vocabulary. Steps and splits count finished units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ..generators.static_step import compiled
from ..samplers.decode import Tally, sample
from .codebook import nearest
from .distilled import Helper

if TYPE_CHECKING:
    from .student import Prediction, Read, Student

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance, a scalar, of the images of predicted vectors and of true ones, both `[B, N, D]`."""


def point(codes: Tensor, noise: Tensor, codebook: Tensor, pending: Tensor) -> Tensor:
    """The point of a trajectory `[B, N, D]`: code vectors, and the noise where tokens are pending.

    Args:
        codes: `[B, N]` at its end.
        noise: `[B, N, D]` at its beginning.
        codebook: `[V, D]`.
        pending: bool `[B, N]`, see `Student.pending`.
    """
    return torch.where(pending[..., None], noise, F.embedding(codes, codebook))


def losses(
    prediction: Prediction,
    codes: Tensor,
    codebook: Tensor,
    pending: Tensor,
    *,
    vector_weight: float = 1.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Means over samples and their pending tokens: cross-entropy of logits, squared distance of vectors, and their sum.

    `L = CE(logits_i, q_i) + λ_e·|x_i - c(q_i)|² + λ_p·d(x, c(q))`. The paper's own weights are not known.

    Args:
        prediction: of a student.
        codes: `[B, N]` at the end of the trajectories.
        codebook: `[V, D]`.
        pending: bool `[B, N]`, at least one of each sample true.
        vector_weight: λ_e.
        perceptual: `d`; `None`: left out.
        perceptual_weight: λ_p.

    Returns:
        `loss`, `cross_entropy` (nats), `vector` (squared length), `accuracy` of the tokens, perhaps `perceptual`.
    """
    logits, vectors = prediction.logits.float(), prediction.vectors.float()
    true = F.embedding(codes, codebook)
    found = {
        "cross_entropy": _mean(F.cross_entropy(logits.transpose(1, 2), codes, reduction="none"), pending),
        "vector": _mean((vectors - true).square().sum(-1), pending),
        "accuracy": _mean((logits.argmax(-1) == codes).float(), pending),
    }
    total = found["cross_entropy"] + vector_weight * found["vector"]
    if perceptual is not None:
        found["perceptual"] = perceptual(torch.where(pending[..., None], vectors, true), true)
        total = total + perceptual_weight * found["perceptual"]
    return {"loss": total, **found}


def _mean(values: Tensor, pending: Tensor) -> Tensor:
    """Of each sample over its pending tokens, then over samples: so that it is one mean however the batch is cut up."""
    return ((values * pending).sum(1) / pending.sum(1)).mean()


def sequence_accuracy(student_codes: Tensor, teacher_codes: Tensor) -> Tensor:
    """Share of samples `[B, N]` that are the same throughout, a scalar.

    Both come from the same noise, so the total variation distance between student and teacher is at most one minus this.
    """
    return (student_codes == teacher_codes).all(dim=1).double().mean()


def compose(
    student: Student, prediction: Prediction, vectors: Tensor, codebook: Tensor, done: int, split: int | None = None
) -> Tensor:
    """The predicted end `[B, N, D]`: codes of the logits before the split, the other head's vectors behind it.

    What was data already is copied, before the split its nearest code.

    Args:
        student: which says where tokens lie.
        prediction: from `vectors`.
        vectors: `[B, N, D]`.
        codebook: `[V, D]`.
        done: finished units of `vectors`.
        split: `None`: the student's.
    """
    known, snapped = _bounds(student, done, split)
    kept = F.embedding(nearest(vectors[:, : min(known, snapped)], codebook), codebook)
    tail = prediction.vectors[:, max(known, snapped) :]
    return _joined(kept, vectors[:, snapped:known], prediction.logits[:, known:snapped].argmax(-1), tail, codebook)


def _bounds(student: Student, done: int, split: int | None) -> tuple[int, int]:
    """Tokens that are data already, and tokens that become codes."""
    return student.tokens_in(done), student.tokens_in(student.split if split is None else split)


def _joined(kept: Tensor, copied: Tensor, codes: Tensor, tail: Tensor, codebook: Tensor) -> Tensor:
    """What was data, its codes before its vectors; then new codes, then new vectors: of `copied` and `codes` one is empty."""
    return torch.cat((kept, copied, F.embedding(codes, codebook), tail.to(kept.dtype)), dim=1)


def _read(student: Student, x: Tensor, condition: Tensor, done: Tensor) -> Read:
    return student.read(x, condition, done)


def _pass(
    student: Student, x: Tensor, condition: Tensor, codebook: Tensor, done: int, split: int | None, compile: bool
) -> Tensor:
    """`compose` of a student's prediction, of which no more is computed than is used; data before the split are codes."""
    known, snapped = _bounds(student, done, split)
    read = (compiled(_read) if compile else _read)(student, x, condition, torch.full((len(x),), known, device=x.device))
    codes = student.logits(read, slice(known, max(known, snapped))).argmax(-1)
    tail = student.vectors(read, slice(max(known, snapped), x.shape[1]))
    return _joined(x[:, : min(known, snapped)], x[:, snapped:known], codes, tail, codebook)


@torch.inference_mode()
def generate(
    student: Student,
    codebook: Tensor,
    condition: Tensor,
    noise: Tensor,
    *,
    steps: Sequence[int] | None = None,
    split: int | None = None,
    start: Tensor | None = None,
    compile: bool = False,
    tally: Tally | None = None,
) -> Tensor:
    """Vectors `[B, N, D]` in as many passes as there are steps: each keeps what lies before it and puts the noise back.

    Args:
        student: in eval mode.
        codebook: `[V, D]`.
        condition: `[B]`.
        noise: `[B, N, D]`.
        steps: finished units at which each pass begins, rising; `None`: all that it was trained for. `[0]` is one step.
        split: see `Student`; `None`: the student's own. All units: every vector is a code.
        start: `[B, N, D]`, of which the units before the first step are kept; needed where that is not 0.
        compile: see `Ask`.
        tally: is told what it cost.

    Raises:
        UserError: a step that it was not trained for, or that needs a start.
    """
    chosen = student.timesteps if steps is None else tuple(steps)
    for step in chosen:
        student.check_step(step)
    if not chosen or any(later <= before for before, later in pairwise(chosen)):
        raise UserError(f"steps {list(chosen)} do not rise", where="student.steps", fix="use [0], or [0, T] as it was trained")
    if start is None and chosen[0] != 0:
        raise UserError(f"a first step from {chosen[0]} with nothing before it", where="student.steps", fix="begin with step 0")
    x = noise if start is None else _snapped(student, start, codebook, chosen[0], split)
    for step in chosen:
        known = student.tokens_in(step)
        x = torch.cat((x[:, :known], noise[:, known:]), dim=1) if known else noise
        x = _pass(student, x, condition, codebook, step, split, compile)
    if tally is not None:
        tally.add(len(chosen), len(chosen))
    return x


def _snapped(student: Student, start: Tensor, codebook: Tensor, done: int, split: int | None) -> Tensor:
    """A start `[B, N, D]` whose data before the split are their nearest codes."""
    first = min(_bounds(student, done, split))
    return torch.cat((F.embedding(nearest(start[:, :first], codebook), codebook), start[:, first:]), dim=1)


@torch.inference_mode()
def assisted(
    student: Student,
    codebook: Tensor,
    condition: Tensor,
    noise: Tensor,
    *,
    helper: Helper,
    keep: int,
    step: int | None = None,
    split: int | None = None,
    ids: Tensor | None = None,
    compile: bool = False,
    tally: Tally | None = None,
) -> Tensor:
    """Vectors `[B, N, D]` with the teacher's help ("pre-trained-n-m"): a step, the teacher from `keep` to `step`, another step.

    The first `keep` units of the first step stay as codes, the teacher draws the units after them as it always does, and the
    student goes on from `step` with the noise it began with. Passes: 1 + (step - keep) + 1; where `keep` is 0, one less.

    Args:
        student: in eval mode.
        codebook: `[V, D]`.
        condition: `[B]`.
        noise: `[B, N, D]`.
        helper: the teacher.
        keep: units, fewer than `step`.
        step: from which the student goes on; `None`: the last one that it was trained for.
        split: see `generate`.
        ids: `[B]` numbers of the samples, for the teacher's draws; `None`: 0 to B - 1.
        compile: see `Ask`; of the student's passes.
        tally: is told what it cost, as one batch.

    Raises:
        UserError: nothing is left for the teacher, or a step that the student was not trained for.
    """
    last = student.timesteps[-1] if step is None else step
    student.check_step(last)
    if not 0 <= keep < last:
        raise UserError(
            f"{keep} units kept, and the student goes on from {last}", where="student.keep",
            fix=f"keep 0 to {last - 1} units" if last else "take a student that was trained for a second step",
        )  # fmt: skip
    cost = Tally()
    options: dict[str, Any] = {"split": split, "compile": compile, "tally": cost}
    given = torch.full(noise.shape[:2], -1, device=noise.device)
    if keep:
        kept = student.tokens_in(keep)
        first = generate(student, codebook, condition, noise, steps=[0], **options)
        given[:, :kept] = nearest(first[:, :kept], codebook)
    codes = sample(
        helper.generator, condition, seed=helper.seed, sample_ids=ids, given=given, until=last, tally=cost, **helper.sampling
    )
    start = F.embedding(codes, codebook)
    found = generate(student, codebook, condition, noise, steps=[last], start=start, **options)
    if tally is not None:
        tally.add(cost.calls, cost.evaluations, cost.depth)
    return found
