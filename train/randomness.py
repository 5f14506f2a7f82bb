"""Random numbers as pure functions of where a run is, so that a resumed run draws the same ones.

Two kinds: the global generators are re-seeded at every step from (seed, step, rank), so there is no generator state to save;
and decisions about one sample come from a hash of (seed, epoch, sample), so they do not depend on the number of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, the increment of splitmix64 (Steele et al. 2014), as a signed integer
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685  # its two multipliers


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (CPU and GPU) for one step of one rank."""
    key = torch.tensor([seed, step, rank])
    torch.manual_seed(int(_mix(_mix(_mix(key[:1]) + key[1:2]) + key[2:])) & (2**63 - 1))


def sample_uniform(seed: int, epoch: Tensor, index: Tensor, salt: int) -> Tensor:
    """One number in [0, 1) for each sample.

    Args:
        seed: of the run.
        epoch: `[B]` int64.
        index: `[B]` int64, the sample's place in the data set.
        salt: tells one use from another.
    """
    return _unit(_sample_bits(seed, epoch, index, salt))


def sample_uniforms(seed: int, epoch: Tensor, index: Tensor, salt: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each sample, `[B, count]`; see `sample_uniform`."""
    bits = _sample_bits(seed, epoch, index, salt)
    return _unit(_mix(bits[:, None] + torch.arange(count, device=bits.device)))


def sample_normals(seed: int, epoch: Tensor, index: Tensor, salt: int, count: int) -> Tensor:
    """`count` standard normal numbers for each sample, `[B, count]`, by Box and Muller; see `sample_uniform`."""
    radius, angle = sample_uniforms(seed, epoch, index, salt, 2 * count).split(count, dim=1)
    return (-2 * radius.clamp(min=2.0**-53).log()).sqrt() * (2 * math.pi * angle).cos()


def _sample_bits(seed: int, epoch: Tensor, index: Tensor, salt: int) -> Tensor:
    return _mix(_mix(_mix(index * 1_000_003 + salt) + epoch) + seed)


def _unit(bits: Tensor) -> Tensor:
    return ((bits >> 11) & (2**53 - 1)).double().mul(2.0**-53).float().clamp(max=1 - 2**-24)


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 on int64 (wrapping), with logical shifts."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX2
    return x ^ ((x >> 31) & (2**33 - 1))
