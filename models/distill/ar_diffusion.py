"""Autoregressive diffusion: a causal backbone and a small network that moves one token from noise to data (MAR's form).

Shapes: `B` batch, `N` tokens of an image, `D` code width, `C` width of the backbone, `W` of the small network, `…` any axes.
`tau` is the noise level: `x_tau = (1 - tau)·x + tau·eps`, velocities are `dx/dtau = E[eps - x | x_tau]`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import PositiveInt
from ..generators.next_token import NextToken
from ..generators.plan import Plan
from ..generators.planned import PlannedGenerator
from ..layers import modulate
from ..samplers.decode import Tally
from ..samplers.guidance import Varying, parse_schedule
from ..tokenizers.base import Tokenizer
from .codebook import nearest
from .distilled import Ask, Distilled

EULER_STEPS = 10
"""Of each token, as the paper measures these models."""
_TIMES, _PERIOD = 256, 10_000.0  # sines and cosines of the noise level, as in DiT and MAR


class VelocityHead(nn.Module):
    """Residual MLP on the noised token, modulated by noise level and features (MAR's diffusion head).

    Args:
        embed_dim: code width `D`.
        features: width `C` of what it is conditioned on.
        width: `W`.
        depth: residual blocks.
    """

    def __init__(self, embed_dim: int, features: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Linear(embed_dim, width)
        self.time = nn.Sequential(nn.Linear(_TIMES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, embed_dim)
        for zeroed in (self.modulation, self.leave):
            for parameter in zeroed.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, tau: Tensor, features: Tensor) -> Tensor:
        """Velocities `[…, D]` at `x […, D]` and noise levels `tau […]` in [0, 1], given `features […, C]`."""
        rates = torch.exp(-math.log(_PERIOD) * torch.arange(_TIMES // 2, device=x.device) / (_TIMES // 2))
        angles = 1000 * tau.float()[..., None] * rates
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.enter.weight.dtype)
        signal = F.silu(self.time(waves) + self.condition(features.to(waves.dtype)))
        hidden = self.enter(x.to(waves.dtype))
        for block in self.blocks:
            hidden = block(hidden, signal)
        scale, shift = self.modulation(signal).chunk(2, dim=-1)
        return self.leave(modulate(F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6), scale, shift))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(signal).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(modulate(self.norm(x), scale, shift))))


class ARDiffusion(Distilled):
    """A teacher whose classification head is replaced by a `VelocityHead`. One form for three roles in DD2.

    As the autoregressive diffusion model it draws token by token; as the fake score network it says how generated tokens are
    distributed given those before; as the generator it makes all tokens at once, `x = eps - v(eps, 1 | noise before)`.

    Args:
        teacher: a `NextScale`, or a `NextToken` that reads vectors (`adapt.continuous`); its head is dropped.
        embed_dim: code width `D`.
        width: `W` of the head; not known of the paper's, MAR: 1024.
        depth: residual blocks of the head; MAR: 3 to 12.

    Raises:
        ValueError: the teacher's inputs cannot be vectors.
    """

    kind: ClassVar[str] = "an autoregressive diffusion model"
    knows: ClassVar[tuple[str, ...]] = ("euler",)

    def __init__(self, teacher: nn.Module, embed_dim: PositiveInt, width: PositiveInt = 1024, depth: PositiveInt = 3) -> None:
        super().__init__()
        reads_codes = isinstance(teacher, NextToken) and isinstance(teacher.tokens, nn.Embedding)
        if not isinstance(teacher, PlannedGenerator) or reads_codes:
            raise ValueError(f"a {type(teacher).__name__} that reads codes alone; wrap it by distill.adapt.continuous")
        self.backbone, self.embed_dim = teacher, embed_dim
        self.plan, self.num_classes = teacher.plan, teacher.num_classes
        self.backbone.head = nn.Identity()
        self.velocity_head = VelocityHead(embed_dim, teacher.transformer.config.dim, width, depth)

    def features(self, values: Tensor, condition: Tensor) -> Tensor:
        """`[B, N, C]`: of token i from the values before it, codes `[B, N]` or vectors `[B, N, D]`."""
        return self.backbone.features(values, condition)

    def velocity(self, features: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """`dx/dtau […, N, D]` of tokens `x` at noise levels `tau […, N]`, given `features [B, N, C]`."""
        return self.velocity_head(x, tau, features.expand(*x.shape[:-1], -1)).to(x.dtype)

    def mean(self, features: Tensor, x: Tensor, tau: Tensor) -> Tensor:
        """Posterior mean `E[x_0 | x_tau] = x - tau·v`, `[…, N, D]`."""
        return x - tau[..., None] * self.velocity(features, x, tau)

    def forward(self, values: Tensor, condition: Tensor, x: Tensor | None = None, tau: Tensor | None = None) -> Tensor:
        """Velocities at `x` and `tau`, or without them what `generate` makes of noise: the entry that wrappers see."""
        if x is None or tau is None:
            return self.generate(values, condition)
        return self.velocity(self.features(values, condition), x, tau)

    def generate(self, noise: Tensor, condition: Tensor) -> Tensor:
        """All tokens `[B, N, D]` in one step from `noise [B, N, D]`: token i sees its own noise and that of those before."""
        start = torch.ones(noise.shape[:-1], device=noise.device)
        return self.mean(self.features(noise, condition), noise, start)

    def bind(self, tokenizer: Tokenizer) -> None:
        """See `Distilled.bind`: a next-scale backbone accumulates scales as its tokenizer does."""
        self.backbone.bind(tokenizer)

    def _draw(self, noise: Tensor, condition: Tensor, codebook: Tensor, ask: Ask, ids: Tensor, cost: Tally) -> Tensor:
        euler = EULER_STEPS if ask.euler is None else ask.euler
        return F.embedding(self.sample(noise, condition, codebook, euler, cost), codebook)

    @torch.no_grad()
    def sample(
        self, noise: Tensor, condition: Tensor, codebook: Tensor, steps: Varying = EULER_STEPS, tally: Tally | None = None
    ) -> Tensor:
        """Codes `[B, N]` drawn unit by unit with a cache, each token by Euler's steps from its noise to the nearest code.

        Args:
            noise: `[B, N, D]`.
            condition: `[B]`.
            codebook: `[V, D]`.
            steps: of each token, rounded down, a number or a schedule: late tokens are known well by those before, and need
                fewer (DiSA: `ramp:5,first=50`).
            tally: is told what it cost.

        Raises:
            UserError: less than one step.
        """
        plan, state = self.plan, self.backbone.begin(condition)
        counts = euler_counts(steps, plan)
        for unit, count in enumerate(counts):
            features, x = self.backbone.propose(state, unit), noise[:, plan.columns(unit)]
            for step in range(count, 0, -1):
                tau = torch.full(x.shape[:-1], step / count, device=x.device)
                x = x - self.velocity(features, x, tau) / count
            self.backbone.commit(state, unit, nearest(x, codebook))
        if tally is not None:
            tally.add(state.calls, state.calls, state.calls + sum(counts))
        return state.codes


def euler_counts(steps: Varying, plan: Plan, where: str = "student.euler") -> list[int]:
    """Euler's steps of every unit, rounded down.

    Args:
        steps: a number or a schedule.
        plan: whose units.
        where: the config key, for the error.

    Raises:
        UserError: less than one step.
    """
    values = parse_schedule(steps, where).over(plan)
    if min(values) < 1:
        raise UserError(f"{min(values):g} steps of a token", where=where, fix="take one step or more")
    return [int(value + 1e-6) for value in values]  # a schedule that means a whole number may miss it by rounding
