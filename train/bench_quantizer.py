"""The nearest-code search beside the plain one: time of both, and the memory each takes beyond its inputs.

Shapes: `R` rows, `D` code width, `V` codebook.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..models.tokenizers.quantizers import nearest_code
from .profiler import allocated_peak

_PLAIN_ROWS = 8192  # the plain search in pieces of 512 MiB: all scores at once are 4 GiB, which a laptop has not to spare


def bench_quantizer(
    seconds: float = 5.0,
    device: torch.device | str = "cpu",
    rows: int = 65536,
    codebook_size: int = 16384,
    dim: int = 8,
) -> dict[str, float]:
    """Search the nearest of `codebook_size` codes for `rows` vectors, by `nearest_code` and by a plain product and argmin.

    Args:
        seconds: for each of the two; at least three calls.
        device: where.
        rows: R.
        codebook_size: V.
        dim: D.

    Returns:
        `search_ms` and `plain_ms`, medians of calls that take turns, their `ratio`, and `search_mib` and `plain_mib`, the peak
        beyond the inputs, of which the result is R·8 bytes.
    """
    generator = torch.Generator().manual_seed(0)
    z, codes = (torch.randn(count, dim, generator=generator).to(device) for count in (rows, codebook_size))

    def plain() -> Tensor:
        return torch.cat([(part @ codes.t()).argmin(1) for part in z.split(_PLAIN_ROWS)])

    def search() -> Tensor:
        return nearest_code(z, codes)

    search_ms, plain_ms = _medians(search, plain, seconds, z.is_cuda)
    return {
        "search_ms": search_ms,
        "plain_ms": plain_ms,
        "ratio": search_ms / plain_ms,
        "search_mib": _peak(search, z.is_cuda) / 2**20,
        "plain_mib": _peak(plain, z.is_cuda) / 2**20,
    }


def _medians(first: Callable[[], Tensor], second: Callable[[], Tensor], seconds: float, cuda: bool) -> tuple[float, float]:
    """Milliseconds of each, in turns, so that both see the same load of the machine."""
    times: tuple[list[float], list[float]] = ([], [])
    first(), second()
    begun = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - begun < 2 * seconds:
        for action, taken in zip((first, second), times, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            action()
            if cuda:
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    return sorted(times[0])[len(times[0]) // 2], sorted(times[1])[len(times[1]) // 2]


def _peak(action: Callable[[], Tensor], cuda: bool) -> int:
    """Largest number of bytes allocated at once by `action`, over those allocated before."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return allocated_peak(action)[1]
