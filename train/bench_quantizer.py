"""The nearest-code search beside the plain one: time of both, and the memory each takes beyond its inputs.

Shapes: `R` rows, `D` code width, `V` codebook.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..evaluate.stopwatch import in_turns
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

    times = in_turns({"search": search, "plain": plain}, 3, z.device, seconds=2 * seconds)
    return {
        "search_ms": 1000 * times["search"],
        "plain_ms": 1000 * times["plain"],
        "ratio": times["plain"] / times["search"],
        "search_mib": _peak(search, z.is_cuda) / 2**20,
        "plain_mib": _peak(plain, z.is_cuda) / 2**20,
    }


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
