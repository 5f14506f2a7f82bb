"""Distilled Decoding 2 (arXiv:2510.21003): the teacher as a conditional score model, and the losses made of it.

Shapes: `M` draws of noise for each token, `B` batch, `N` tokens of an image, `D` code width, `V` codebook.
`tau` is the noise level as in `ar_diffusion`; weights of losses and the distribution of `tau` are not known of the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import UserError
from ..samplers.decode import Tally, sample
from .codebook import nearest
from .distilled import Helper
from .flow_map import Mixture

Form = Literal["sid", "dmd"]
TeacherLogits = Callable[[Tensor], Tensor]
"""Logits `[B, N, V]` of the teacher, guided and truncated, given a prefix of vectors `[B, N, D]`."""
Velocities = Callable[..., Tensor]
"""An `ARDiffusion`, or its wrapper: `(prefix, condition, x, tau)` to velocities."""
LEAST, MOST = 0.02, 0.98
"""Range of the noise levels drawn: at 0 the closed form has no width, at 1 the prefix alone decides."""
_FLAT = 1e-2  # least weight: where generator and teacher agree, the gradient is not blown up


class TeacherScore:
    """The posterior mean that a teacher implies at every noise level: closed form over its codes.

    Args:
        logits: `[B, N, V]`, -inf where a code cannot be taken.
        codebook: `[V, D]`.
        support: keep so many of the likeliest codes of each token (of a truncated teacher: as many as it keeps);
            `None`: all.
        chunk: tokens at once, which bounds memory at `chunk x support`; `None`: all.
    """

    def __init__(self, logits: Tensor, codebook: Tensor, support: int | None = None, chunk: int | None = None) -> None:
        self.mixture = Mixture.of(logits.flatten(0, 1), codebook.float())
        if support is not None and support < logits.shape[-1]:
            self.mixture, _ = self.mixture.gathered(support)
        self.chunk = chunk or max(1, logits.shape[0] * logits.shape[1])

    def mean(self, x: Tensor, tau: Tensor) -> Tensor:
        """`E[x_0 | x_tau]`, `[M, B, N, D]`, at `x` of that shape and `tau [M, B, N]`; gradients pass to `x`."""
        flat, level = x.float().flatten(1, 2), tau.float().flatten(1, 2)
        return torch.stack([self._mean(*draw) for draw in zip(flat, level, strict=True)]).view(x.shape)

    def _mean(self, x: Tensor, tau: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(x), self.chunk):
            rows = slice(start, start + self.chunk)
            mixture, time = self.mixture.rows(rows), 1 - tau[rows, None]
            parts.append(checkpoint(mixture.mean, x[rows], time, use_reentrant=False))
        return torch.cat(parts)

    def velocity(self, x: Tensor, tau: Tensor) -> Tensor:
        """`dx/dtau = (x - E[x_0 | x_tau])/tau`, same shapes."""
        return (x - self.mean(x, tau)) / tau[..., None]


def noised(x: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """`(1 - tau)·x + tau·noise`, `[M, B, N, D]` of `x [B, N, D]`."""
    return (1 - tau[..., None]) * x + tau[..., None] * noise


def levels(uniform: Tensor, power: float = 1.0) -> Tensor:
    """Noise levels in `LEAST … MOST` from numbers `u` in [0, 1), any shape: with u² half of them are in the lowest quarter."""
    return LEAST + (MOST - LEAST) * uniform**power


def ground_truth_score_loss(
    model: Velocities, codes: Tensor, condition: Tensor, teacher: TeacherScore, codebook: Tensor, tau: Tensor, noise: Tensor
) -> Tensor:
    """GTS, `|v_psi - v_Phi|²` on sequences that the teacher drew: regresses its exact velocity, not one draw of it.

    Args:
        model: to be trained.
        codes: `[B, N]`, drawn from the teacher.
        condition: `[B]`.
        teacher: its score given these codes.
        codebook: `[V, D]`.
        tau: `[M, B, N]`.
        noise: `[M, B, N, D]`.
    """
    vectors = F.embedding(codes, codebook)
    x = noised(vectors, noise, tau)
    with torch.no_grad():
        target = teacher.velocity(x, tau)
    return (model(vectors, condition, x, tau) - target).square().mean()


def fake_score_loss(
    model: Velocities, vectors: Tensor, prefix: Tensor, condition: Tensor, tau: Tensor, noise: Tensor
) -> Tensor:
    """Denoising, `|v_psi - (eps - x)|²`: the fake score network learns how generated tokens are distributed given a prefix.

    Args:
        model: the fake score network.
        vectors: `[B, N, D]` of the generator, without gradient; of data: plain diffusion training.
        prefix: what it is conditioned on, `[B, N, D]`: see `prefix_of`.
        condition: `[B]`.
        tau: `[M, B, N]`.
        noise: `[M, B, N, D]`.
    """
    found = model(prefix, condition, noised(vectors, noise, tau), tau)
    return (found - (noise - vectors)).square().mean()


def prefix_of(vectors: Tensor, codebook: Tensor, snap: bool) -> Tensor:
    """Generated vectors `[B, N, D]` as a prefix, without gradient; snapped to codes for a teacher that reads nothing else."""
    detached = vectors.detach()
    return F.embedding(nearest(detached, codebook), codebook) if snap else detached


def distillation_loss(x: Tensor, real: Tensor, fake: Tensor, form: Form = "sid", alpha: float = 1.0) -> Tensor:
    """The discrepancy of two conditional scores at the noised tokens, by their posterior means.

    `sid` (SiD, arXiv:2404.04057): `(f_Phi - f_psi)·((f_Phi - x) - α(f_Phi - f_psi))/w`, gradients also through the means.
    `dmd` (DMD2): a loss whose gradient at `x` is `(f_psi - f_Phi)/w`; the means need no graph.
    `w` is the mean absolute of `x - f_Phi`, of each token, held fixed.

    Args:
        x: generated tokens, `[B, N, D]`.
        real: `f_Phi`, `[M, B, N, D]`.
        fake: `f_psi`, same shape.
        form: which.
        alpha: of `sid`; DD2: 1.
    """
    weight = (x - real).abs().mean(-1, keepdim=True).detach().clamp_min(_FLAT)
    difference = real - fake
    if form == "dmd":
        return 0.5 * (x - (x + difference / weight).detach()).square().sum(-1).mean()
    return (difference * ((real - x) - alpha * difference) / weight).sum(-1).mean()


def pair_loss(x: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Mean squared distance of tokens `x [B, N, D]`, made of a pair's noise, to the pair's codes `[B, N]`.

    The regression of DMD (arXiv:2311.18828), which takes a perceptual distance of images; tokens have the codebook's own.
    """
    return (x - F.embedding(codes, codebook)).square().sum(-1).mean()


def generator_loss(
    x: Tensor,
    fake: Velocities,
    teacher_logits: TeacherLogits,
    codebook: Tensor,
    condition: Tensor,
    tau: Tensor,
    noise: Tensor,
    *,
    form: Form = "sid",
    alpha: float = 1.0,
    snap: bool = False,
    support: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Conditional score distillation: at its optimum the one-step generator's joint distribution is the teacher's.

    Both scores are conditioned on the generated prefix without gradient, so only the generator is back-propagated through,
    and of the fake score network its head.

    Args:
        x: made by the generator that is to be trained, `[B, N, D]`.
        fake: score network of its outputs, its parameters frozen meanwhile.
        teacher_logits: of the teacher, given the prefix.
        codebook: `[V, D]`.
        condition: `[B]`.
        tau: `[M, B, N]`.
        noise: `[M, B, N, D]`.
        form: see `distillation_loss`.
        alpha: see `distillation_loss`.
        snap: see `prefix_of`.
        support: see `TeacherScore`.
        chunk: see `TeacherScore`.
    """
    prefix = prefix_of(x, codebook, snap)
    with torch.no_grad():
        teacher = TeacherScore(teacher_logits(prefix), codebook, support, chunk)
    with torch.set_grad_enabled(form == "sid"):
        at = noised(x, noise, tau)
        real, imitated = teacher.mean(at, tau), at - tau[..., None] * fake(prefix, condition, at, tau)
    return distillation_loss(x, real, imitated, form, alpha)


def refine(
    helper: Helper, vectors: Tensor, condition: Tensor, codebook: Tensor, units: int, *, ids: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:  # fmt: skip
    """Codes `[B, N]` of which the teacher draws the last `units` anew, given the others: each unit is one more step.

    Args:
        helper: the teacher.
        vectors: `[B, N, D]` of a one-step generator.
        condition: `[B]`.
        codebook: `[V, D]`.
        units: 1 to all.
        ids: `[B]` numbers of the samples, for the teacher's draws; `None`: 0 to B - 1.
        tally: is told what the teacher cost.

    Raises:
        UserError: fewer or more units than there are.
    """
    plan = helper.generator.plan
    if not 1 <= units <= plan.n_units:
        raise UserError(
            f"{units} of {plan.n_units} units to draw anew", where="student.redraw", fix=f"choose 1 to {plan.n_units}"
        )
    given = nearest(vectors, codebook)
    for unit in range(plan.n_units - units, plan.n_units):
        given[:, plan.columns(unit)] = -1
    return sample(helper.generator, condition, seed=helper.seed, sample_ids=ids, given=given, tally=tally, **helper.sampling)
