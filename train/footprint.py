"""What a rank holds and sends under each strategy, by formulas that docs/scaling.md explains; checked against real processes.

P trained elements of a network, A averaged ones, U those of its largest unit, R those outside of units; N ranks; in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..conf.spine import Strategy
from .cost import Cost
from .engines import MIB
from .network import Trainable
from .pieces import trained
from .units import units

FP32 = 4
REUSED = 10**9
"""Elements that DeepSpeed leaves gathered at stage 3 because they are needed again soon (its `stage3_max_reuse_distance`)."""


@dataclass(frozen=True)
class Size:
    """Elements of a trained network.

    Args:
        trained: P.
        averaged: A, 0 without an EMA.
        unit: U.
        rest: R.
        largest: of the largest parameter.
        twice: its gradient is differentiated again, which keeps it from being sharded (see `make_engine`).
    """

    trained: int
    averaged: int
    unit: int
    rest: int
    largest: int = 0
    twice: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Args:
        held: by tensors at the worst moment of a step, by what they are for.
        sent: in a step, on a ring.
    """

    held: dict[str, float]
    sent: float

    @property
    def total(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.held.values())


def size_of(item: Trainable, *, averages: bool) -> Size:
    """The size of a network that is built but not yet under a strategy.

    Args:
        item: the network.
        averages: the run keeps an EMA.
    """
    counts = [value.numel() for _, value in trained(item.module)]
    within = [sum(value.numel() for value in part.parameters()) for part in units(item.module)]
    total = sum(counts)
    averaged = total if averages and item.ema else 0
    return Size(total, averaged, max(within, default=0), total - sum(within), max(counts, default=0), item.twice)


def fixed_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of what is not trained: frozen networks and buffers, the same under every strategy."""
    kept: list[Tensor] = [value for module in modules for value in module.parameters() if not value.requires_grad]
    kept += [value for module in modules for value in module.buffers()]
    return sum(value.numel() * value.element_size() for value in kept)


def footprint(strategy: Strategy, ranks: int, sizes: Sequence[Size], fixed: int, cost: Cost, accumulate: int = 1) -> Footprint:
    """What a rank holds and sends.

    Args:
        strategy: of the run.
        ranks: N.
        sizes: of the trained networks.
        fixed: bytes of what is not trained.
        cost: of a step.
        accumulate: micro-batches of a step.
    """
    shares = [_network(_effective(strategy.name, size), strategy, ranks, size) for size in sizes]
    staying = sum(share.stays * size.trained for share, size in zip(shares, sizes, strict=True))
    grows = FP32 * staying / max(1, sum(size.trained for size in sizes))
    activations, finished = cost.worst(lambda count: grows * count)
    during = _added([*(share.during for share in shares), {"activations": activations, "gradients": grows * finished}])
    update = _added([share.update for share in shares])
    worst = during if sum(during.values()) >= sum(update.values()) else update
    held = _added([*(share.held for share in shares), {"frozen and buffers": fixed}, worst])
    sent = sum(_sent(_effective(strategy.name, size), strategy, ranks, size.trained, accumulate) for size in sizes)
    return Footprint({what: count for what, count in held.items() if count}, sent)


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _effective(name: str, size: Size) -> str:
    return {"fsdp": "ddp", "zero3": "zero2"}.get(name, name) if size.twice else name


@dataclass(frozen=True)
class _Share:
    """Bytes of one network on a rank: always, besides during forward and backward, besides during the update; and the part of
    a finished gradient that stays from the backward to the update."""

    held: dict[str, float]
    during: dict[str, float]
    update: dict[str, float]
    stays: float


def _network(name: str, strategy: Strategy, ranks: int, size: Size) -> _Share:
    p, shard = FP32 * size.trained, FP32 * size.trained / ranks
    bucket = min(strategy.bucket_mib * MIB, p) * (1 if strategy.accelerator == "cpu" else 2)  # a GPU sends one, fills another
    sharded = name not in ("single", "ddp")
    mine = shard if sharded else p
    held: dict[str, float] = {"moments": 2 * mine, "average": FP32 * size.averaged * mine / p if p else 0}
    during: dict[str, float] = {}
    update: dict[str, float] = {}
    if name in ("single", "ddp"):
        held["weights"] = p
        if name == "ddp":
            held["gradients"] = p  # its buckets, which are there all the time
        update = {} if name == "ddp" else {"gradients": p}
        stays = 0.0 if name == "ddp" else 1.0
    elif name == "fsdp":
        held["weights"] = shard
        during = {
            "gathered weights": FP32 * (size.rest + 2 * size.unit) if strategy.reshard else p,
            "gradient buffers": FP32 * 3 * size.unit,
        }
        update, stays = {"gradients": shard}, 1 / ranks
    elif name in ("zero1", "zero2"):
        held |= {"weights": p, "masters": shard}
        during = {"gradient buffers": bucket}
        update, stays = {"gradients": 2 * shard}, 1.0 if name == "zero1" else 1 / ranks
    else:
        held |= {"weights": shard, "masters": shard, "gradients": shard}
        during = {"gathered weights": FP32 * min(size.trained, REUSED), "gradient buffers": bucket}
        update, stays = {}, 0.0
    return _Share(held, during, update, stays)


def _sent(name: str, strategy: Strategy, ranks: int, trained_elements: int, accumulate: int) -> float:
    """Bytes that one rank sends in a step; on a ring, a pass (an all-gather or a reduce-scatter) is P (N-1)/N elements."""
    passes = {
        "single": 0,
        "ddp": 2,
        "fsdp": (2 if strategy.reshard else 1) * accumulate + 1,
        "zero1": 2,
        "zero2": accumulate + 1,
        "zero3": 3 * accumulate,
    }[name]
    return FP32 * trained_elements * passes * (ranks - 1) / ranks
