"""The token map: the flow from a Gaussian to a mixture of codes turns a draw into a function of noise (arXiv:2412.17153).

Shapes: `T` tokens, `D` code width, `V` codebook, `K` codes that a token may take.
Time runs from noise to data: `x_t = t·x_1 + (1 - t)·eps`, `t = 0` noise (Distilled Decoding 1). Its successor counts the noise
level `tau = 1 - t`: scores and means are the same there, velocities have the other sign. All in float32 at least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..tokenizers.quantizers.search import CHUNK, CHUNK_CPU, full_float32

Solver = Literal["euler", "heun", "dpm"]


@dataclass(frozen=True)
class Mixture:
    """What each token may become: `sum_j p_j · delta(c_j)`.

    Args:
        log_p: `[T, K]`, -inf where a code cannot be taken; need not be normalised.
        codes: `[K, D]` shared by all tokens, or `[T, K, D]`.
    """

    log_p: Tensor
    codes: Tensor

    @classmethod
    def of(cls, logits: Tensor, codebook: Tensor) -> Mixture:
        """The mixture of `softmax(logits)` `[T, V]` over `codebook [V, D]`, all codes in it."""
        return cls(logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1), codebook)

    def rows(self, part: slice) -> Mixture:
        """That of some of the tokens."""
        return Mixture(self.log_p[part], self.codes if self.codes.ndim == 2 else self.codes[part])

    def gathered(self, count: int) -> tuple[Mixture, Tensor]:
        """The same with the `count` likeliest codes of each token alone, and which these are, `[T, count]`."""
        kept, chosen = self.log_p.topk(count, dim=-1)
        return Mixture(kept, self.codes[chosen]), chosen

    @functools.cached_property
    def half_squares(self) -> Tensor:
        """`|c_j|²/2`, `[K]` or `[T, K]`."""
        return self.codes.square().sum(-1) / 2

    def dots(self, x: Tensor) -> Tensor:
        """`<x, c_j>` `[T, K]` of `x [T, D]`."""
        return _dots(x, self.codes)

    def log_weights(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Posterior weights `w_j = P(c_j | x_t)`, unnormalised logarithms `[T, K]`.

        `log w_j = log p_j + (t·<x, c_j> - t²·|c_j|²/2)/(1 - t)²`.

        Args:
            x: `[T, D]`.
            t: in [0, 1), a number or `[T, 1]`.
        """
        return self.log_p + (t * self.dots(x) - t * t * self.half_squares) / (1 - t) ** 2

    def mean(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Posterior mean `E[x_1 | x_t] = sum_j w_j c_j`, `[T, D]`."""
        return _average(self.log_weights(x, t), self.codes)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """`dx/dt = (E[x_1 | x] - x)/(1 - t)`, `[T, D]`; in the other convention `dx/dtau` is its negative."""
        return (self.mean(x, t) - x) / (1 - t)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Gradient of `log p_t(x)`, `(t·E[x_1 | x] - x)/(1 - t)²`, `[T, D]`; `-E[eps | x]/tau` in the other convention."""
        return (t * self.mean(x, t) - x) / (1 - t) ** 2

    def nearest(self, x: Tensor) -> Tensor:
        """Index `[T]` of the nearest code that can be taken."""
        distance = self.half_squares - self.dots(x)
        return distance.masked_fill(self.log_p == -torch.inf, torch.inf).argmin(-1)


def _dots(x: Tensor, codes: Tensor) -> Tensor:
    return x @ codes.t() if codes.ndim == 2 else torch.einsum("td,tkd->tk", x, codes)


def _average(log_weights: Tensor, codes: Tensor) -> Tensor:
    weights = log_weights.softmax(-1)
    return weights @ codes if codes.ndim == 2 else torch.einsum("tk,tkd->td", weights, codes)


class TokenMap:
    """Noise to codes, in as many steps as it takes to make the map's outcome distributed as `p` for all practical purposes.

    Steps are uniform in `t`; the last one lands on the posterior mean, which by then is a code, and the nearest code is taken.
    With DPM-Solver++(2M) in 100 steps 99.8 % of noises reach the code that the exact flow leads to (V 16384, D 8).

    Args:
        codebook: `[V, D]`, as the decoder gets the codes: l2-normalised where the quantizer does so.
        solver: `dpm` is DPM-Solver++(2M), `heun` asks twice a step, `euler` is DDIM.
        steps: of the solver.
        fused: run each step through `torch.compile`; worth it on a GPU.
        chunk: entries of `[T, K]` at once; `None`: as many as suit the device.

    Raises:
        ValueError: no such solver, or less than one step.
    """

    def __init__(
        self, codebook: Tensor, solver: Solver = "dpm", steps: int = 100, fused: bool = False, chunk: int | None = None
    ) -> None:
        if solver not in SOLVERS or steps < 1:
            raise ValueError(f"solver {solver!r} in {steps} steps; choose one of {', '.join(SOLVERS)}, and 1 step or more")
        self.codebook, self.solver, self.steps, self.fused, self.chunk = codebook, solver, steps, fused, chunk

    def __call__(self, noise: Tensor, logits: Tensor) -> Tensor:
        """Codes `[…]` int64 of `noise […, D]` under `softmax(logits […, V])`; those of probability 0 are never taken."""
        return self._apply(noise, logits)[0]

    def land(self, noise: Tensor, logits: Tensor) -> Tensor:
        """Where the flow lands, `[…, D]`, before the nearest code is taken."""
        return self._apply(noise, logits)[1]

    @torch.no_grad()
    def _apply(self, noise: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        flat, codebook = noise.flatten(0, -2), self.codebook.to(noise)
        with torch.autocast(noise.device.type, enabled=False), full_float32():
            mixture = Mixture.of(logits.flatten(0, -2).to(noise), codebook)
            count = int((mixture.log_p > -torch.inf).sum(-1).max()) if len(flat) else 1
            budget = self.chunk or (CHUNK if noise.is_cuda else CHUNK_CPU)
            size = max(1, budget // count)
            parts = [self._solve(flat[rows], mixture.rows(rows), count) for rows in _slices(len(flat), size)]
        codes = torch.cat([part[0] for part in parts]) if parts else flat.new_zeros(0, dtype=torch.int64)
        landed = torch.cat([part[1] for part in parts]) if parts else flat
        return codes.view(noise.shape[:-1]), landed.view(noise.shape)

    def _solve(self, noise: Tensor, mixture: Mixture, count: int) -> tuple[Tensor, Tensor]:
        """Codes `[T]` and landing points `[T, D]` of one chunk."""
        chosen = None
        if 2 * count <= mixture.log_p.shape[-1]:
            mixture, chosen = mixture.gathered(count)
        landed = SOLVERS[self.solver](noise, mixture, self.steps, _compiled_step() if self.fused else _step)
        found = mixture.nearest(landed)
        return found if chosen is None else chosen.gather(1, found[:, None])[:, 0], landed


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _times(steps: int) -> list[tuple[float, float]]:
    return list(pairwise(index / steps for index in range(steps + 1)))


Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _step(
    x: Tensor, previous: Tensor, log_p: Tensor, codes: Tensor, half_squares: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """`x` at the end of a step, and the posterior mean at its start: `keep·x + move·(mean + extrapolate·(mean - previous))`.

    Args:
        x: `[T, D]`.
        previous: posterior mean one step before, `[T, D]`.
        log_p: of the mixture.
        codes: of the mixture.
        half_squares: of the mixture.
        numbers: `[5]`: `t/(1-t)²`, `t²/(1-t)²`, keep, move, extrapolate.
    """
    by_dot, by_square, keep, move, extrapolate = numbers.unbind()
    mean = _average(log_p + by_dot * _dots(x, codes) - by_square * half_squares, codes)
    return keep * x + move * (mean + extrapolate * (mean - previous)), mean


@functools.cache
def _compiled_step() -> Step:
    return torch.compile(_step, dynamic=True)


def _numbers(a: float, b: float, extrapolate: float) -> list[float]:
    return [a / (1 - a) ** 2, (a / (1 - a)) ** 2, (1 - b) / (1 - a), (b - a) / (1 - a), extrapolate]


def _linear(noise: Tensor, mixture: Mixture, table: list[list[float]], step: Step) -> Tensor:
    """Steps that are linear in the posterior means of their start and of the start before."""
    numbers = torch.tensor(table, dtype=torch.float64).to(noise.dtype).to(noise.device)
    x, mean = noise, noise
    for row in numbers:
        x, mean = step(x, mean, mixture.log_p, mixture.codes, mixture.half_squares, row)
    return x


def _euler(noise: Tensor, mixture: Mixture, steps: int, step: Step) -> Tensor:
    return _linear(noise, mixture, [_numbers(a, b, 0.0) for a, b in _times(steps)], step)


def _dpm(noise: Tensor, mixture: Mixture, steps: int, step: Step) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022: the mean is extrapolated in `lambda = log(t/(1-t))`; first and last steps are not."""
    table = []
    for index, (a, b) in enumerate(_times(steps)):
        # The first interval is infinitely long in lambda, so the second step has nothing to extrapolate from either.
        inner = 2 <= index < steps - 1
        table.append(_numbers(a, b, _length(a, b) / (2 * _length(a - (b - a), a)) if inner else 0.0))
    return _linear(noise, mixture, table, step)


def _length(a: float, b: float) -> float:
    return math.log(b / (1 - b)) - math.log(a / (1 - a))


def _heun(noise: Tensor, mixture: Mixture, steps: int, step: Step) -> Tensor:
    """Trapezoids; the last step is Euler's, since the velocity ends at 0/0."""
    x = noise
    for a, b in _times(steps)[:-1]:
        before = mixture.velocity(x, a)
        x = x + (b - a) / 2 * (before + mixture.velocity(x + (b - a) * before, b))
    return mixture.mean(x, 1 - 1 / steps)


SOLVERS: dict[str, Callable[[Tensor, Mixture, int, Step], Tensor]] = {"dpm": _dpm, "heun": _heun, "euler": _euler}
