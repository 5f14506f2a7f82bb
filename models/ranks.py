"""Sums and collections over data-parallel ranks, as operators that a compiled graph calls as they stand.

On one rank each is the identity (a collection of one), and no process group is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """Number of data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(local: Tensor) -> Tensor:
    """Sum of equally shaped tensors, the same on every rank; no gradient."""
    return _sum(local.detach()) if ranks() > 1 else local.detach()


def mean_over_ranks(local: Tensor) -> Tensor:
    """Mean of equally shaped tensors, with the gradient of the local one.

    The gradient has no factor 1/ranks: data-parallel training averages gradients, which brings it.
    """
    if ranks() == 1:
        return local
    return sum_over_ranks(local) / ranks() + (local - local.detach())


def total_over_ranks(local: Tensor) -> Tensor:
    """Sum of equally shaped tensors, with the gradient of the sum of what every rank makes of it, any number of times."""
    return _Total.apply(local) if ranks() > 1 else local


def gather_over_ranks(local: Tensor) -> Tensor:
    """Equally shaped tensors, stacked `[ranks, …]`, the same on every rank; no gradient."""
    return _gather(local.detach()) if ranks() > 1 else local.detach()[None]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _sum(local)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:  # type: ignore[override]
        return total_over_ranks(gradient[0])


@torch.library.custom_op("tokar::sum_over_ranks", mutates_args=())
def _sum(local: Tensor) -> Tensor:
    total = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@_sum.register_fake
def _(local: Tensor) -> Tensor:
    return torch.empty_like(local, memory_format=torch.contiguous_format)


@torch.library.custom_op("tokar::gather_over_ranks", mutates_args=())
def _gather(local: Tensor) -> Tensor:
    everyone = local.new_empty(ranks(), *local.shape)
    dist.all_gather(list(everyone.unbind()), local.contiguous())
    return everyone


@_gather.register_fake
def _(local: Tensor) -> Tensor:
    return local.new_empty(ranks(), *local.shape)
