"""The search for the best code of each row, exact and in pieces.

Shapes: `R` rows: all positions of a batch, flattened; `D` code width, `V` codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Scores [rows, V] held at once. On a CPU the search is three times faster (V 16384) when they stay in its cache (1 MiB).
CHUNK_CPU, CHUNK = 1 << 18, 1 << 24


def nearest_code(rows: Tensor, codes: Tensor, chunk: int | None = None) -> Tensor:
    """Index `[R]` of the code with the smallest squared distance to each row, compared in full float32.

    Args:
        rows: `[R, D]`.
        codes: `[V, D]`.
        chunk: see `best_code`.
    """
    # argmin |z − e|² = argmax (z·e − |e|²/2): one matrix product that adds the bias on the way.
    return best_code(rows, codes, -0.5 * codes.square().sum(-1), chunk)


@torch.library.custom_op("tokar::best_code", mutates_args=())
def best_code(rows: Tensor, codes: Tensor, bias: Tensor, chunk: int | None = None) -> Tensor:
    """Index `[R]` of the code with the largest row·code + bias, the first of equals; no gradient.

    Args:
        rows: `[R, D]`.
        codes: `[V, D]`.
        bias: `[V]`.
        chunk: rows compared at once; by default as many as keep the scores below 64 MiB (1 MiB on a CPU, more for wide codes).
    """
    parts = rows.split(chunk or _rows_at_once(codes, rows.is_cuda))
    with full_float32():
        return torch.cat([torch.addmm(bias, part, codes.t()).argmax(-1) for part in parts])


@best_code.register_fake
def _(rows: Tensor, codes: Tensor, bias: Tensor, chunk: int | None = None) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


def _rows_at_once(codes: Tensor, cuda: bool) -> int:
    size, dim = codes.shape
    most = max(1, CHUNK // size)
    # A product with fewer rows than columns spends its time on reading the codes.
    return most if cuda else min(most, max(CHUNK_CPU // size, dim))


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside: its 10-bit mantissa would make the codes of an image depend on a speed switch.

    This is why the search is an operator of its own: `torch.compile` calls it as it stands.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
