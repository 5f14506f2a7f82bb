"""Random numbers that depend on nothing but where they are used: (seed, epoch, sample), and the order of an epoch.

Shapes: `B` samples, `N` samples of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def hashes(seed: int, epochs: np.ndarray, indices: np.ndarray, draws: int) -> np.ndarray:
    """Independent 64-bit numbers for every sample.

    A counter-based hash instead of a generator per sample: a batch costs a few array operations, and the numbers do
    not depend on the order, the batch or the worker.

    Args:
        seed: of the run, any integer.
        epochs: `[B]` integers.
        indices: `[B]` integers.
        draws: how many numbers each sample takes.

    Returns:
        `[B, draws]` uint64.
    """
    state = np.full(len(indices), seed & (2**64 - 1), dtype=np.uint64)
    for part in (epochs, indices):
        state = _mix(state + _GOLDEN) ^ _mix(np.asarray(part).astype(np.uint64) * _MIX[0] + _GOLDEN)
    return _mix(state[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))


def uniforms(seed: int, epochs: np.ndarray, indices: np.ndarray, draws: int) -> np.ndarray:
    """`[B, draws]` float64 in [0, 1), see `hashes`."""
    return (hashes(seed, epochs, indices, draws) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order `[N]` int64 of one epoch, a pure function of its arguments (Philox keyed by seed and epoch)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def gaussian(seed: int, ids: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of each sample, `[B, *shape]` float32: a pure function of (seed, id), whatever the batch.

    Philox's integers are the same in every version of numpy, those of its normal numbers are not promised to be: the formula
    of Box and Muller is applied here.

    Args:
        seed: not negative.
        ids: of the samples, not negative.
        shape: of one sample's numbers.
    """
    count = int(np.prod(shape))
    half = -(-count // 2)
    raw = [np.random.Philox(key=[seed, int(index)], counter=[0, 0, 0, 2]).random_raw(2 * half) for index in ids]
    uniform = (
        (np.array(raw, dtype=np.uint64).reshape(len(raw), 2 * half) >> np.uint64(11)).astype(np.float64) + 0.5
    ) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, :half])), 2 * np.pi * uniform[:, half:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), axis=1)[:, :count]
    return normal.astype(np.float32).reshape(len(raw), *shape)
