"""What moves a codebook without a gradient: clusters, k-means, draws from the batch; the same on every rank.

Shapes: `R` rows of this rank: all positions of its batch, flattened; `D` code width, `V` codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ranks import gather_over_ranks, ranks, sum_over_ranks
from .search import nearest_code

_KMEANS_ITERATIONS = 10


def clusters(rows: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many rows each code has `[V]`, and their sum `[V, D]`, over all ranks.

    Args:
        rows: `[R, D]`.
        indices: code of each row `[R]`.
        codebook_size: V.
    """
    counted = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    total = sum_over_ranks(torch.zeros(codebook_size, counted.shape[1], device=rows.device).index_add_(0, indices, counted))
    return total[:, -1], total[:, :-1]


def draw(rows: Tensor, count: int) -> Tensor:
    """Rows of all ranks at random `[count, D]`, each rank giving its share; repeated only where there are too few.

    It always takes the same amount of torch's randomness, and nothing is read back from the device.
    """
    share = -(-count // ranks())
    order = torch.randperm(rows.shape[0], device=rows.device)
    picked = rows[order[torch.arange(share, device=rows.device) % rows.shape[0]]]
    return gather_over_ranks(picked).transpose(0, 1).flatten(0, 1)[:count]


@torch.library.custom_op("tokar::kmeans", mutates_args=())
def kmeans(rows: Tensor, codebook: Tensor, batches_left: Tensor, batches: int, unit: bool) -> Tensor:
    """Lloyd's iterations from `codebook` over the rows of all ranks, unless no batch is left.

    Codes without rows move onto random ones: all of them in the first batch, later only those that double another code, which
    a batch with fewer rows than codes has left behind. An operator of its own: `batches_left` is read back from the device,
    which a compiled graph cannot do.

    Args:
        rows: `[R, D]`.
        codebook: `[V, D]`.
        batches_left: a scalar, the same on every rank; at 0 the codebook is returned as it is.
        batches: of them all, the first included.
        unit: centroids are normalised.
    """
    left, centroids = int(batches_left), codebook.clone()
    for _ in range(_KMEANS_ITERATIONS if left > 0 else 0):
        counts, sums = clusters(rows, nearest_code(rows, centroids), len(centroids))
        idle = (counts == 0) & (left == batches or _doubles(centroids))
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
        centroids = torch.where(idle[:, None], draw(rows, len(centroids)), means)
        centroids = F.normalize(centroids, dim=-1) if unit else centroids
    return centroids


@kmeans.register_fake
def _(rows: Tensor, codebook: Tensor, batches_left: Tensor, batches: int, unit: bool) -> Tensor:
    return torch.empty_like(codebook)


def _doubles(codes: Tensor) -> Tensor:
    """Which codes equal one before them `[V]`: of equals, the search finds the first."""
    return nearest_code(codes, codes) < torch.arange(len(codes), device=codes.device)


def nearest_row(rows: Tensor, codes: Tensor) -> Tensor:
    """For each code the row of any rank that lies nearest to it `[V, D]`.

    Args:
        rows: `[R, D]`.
        codes: `[V, D]`.
    """
    candidates = gather_over_ranks(rows[nearest_code(codes, rows)])
    best = (candidates - codes).square().sum(-1).argmin(0)
    return candidates[best, torch.arange(codes.shape[0], device=rows.device)]
