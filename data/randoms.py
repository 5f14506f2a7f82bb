"""Random numbers that depend on nothing but where they are used: (seed, epoch, sample), and the order of an epoch.

Shapes: `B` samples, `N` samples of an epoch.
"""

from __future__ import annotations

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
