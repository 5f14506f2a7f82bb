"""How one network is spread over the ranks: whole on each, in FSDP2's shards, or by DeepSpeed's ZeRO.

An engine hides it behind a forward, a backward, the gradients and masters of this rank (see `pieces.py`), and the update.
What is decided about an update (norm, clipping, loss scale, veto) is decided in `network.py`, the same for all: it is handed
to the fused optimizer as `grad_scale` and `found_inf`, tensors on the device.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conf.spine import Optim, Strategy
from .optim import make_optimizer
from .pieces import Piece, trained, whole_pieces
from .units import units

Decide = Callable[[Sequence[Tensor]], None]
"""Sees the gradients of this rank's masters just before the update, and tells the optimizer what to make of them."""
MIB = 2**20


class Engine(ABC):
    """A network under a strategy.

    Args:
        module: the plain network.
        wrapped: what is called for a forward: the module with its arithmetic around it.
    """

    sharded = False
    """A rank holds only a part of the masters."""
    optimizer: torch.optim.Optimizer
    masters: list[Tensor]
    pieces: list[Piece]

    def __init__(self, module: nn.Module, wrapped: nn.Module) -> None:
        self.module, self.wrapped = module, wrapped
        self.plain = wrapped
        """The same forward without a strategy's bookkeeping of gradients."""

    def __call__(self, *inputs: Any) -> Any:
        """Forward."""
        return self.wrapped(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over ranks, to what is there."""
        loss.backward()

    def follow(self) -> None:
        """Let masters that are not the weights themselves follow parameters that a forward moves (a part's `moving`).

        Right behind the forward of the part that moves them, before anything lets go of gathered weights.
        """
        for prefix, part in self.module.named_modules():
            for name in getattr(part, "moving", ()):
                full = f"{prefix}.{name}".lstrip(".")
                pieces = [piece for piece in self.pieces if piece.name == full]
                part.register_forward_hook(partial(self._follow, name, pieces), prepend=True)

    @torch.no_grad()
    def _follow(self, name: str, pieces: list[Piece], part: nn.Module, *_: Any) -> None:
        if part.training:
            moved = getattr(part, name).detach().reshape(-1)
            for piece in pieces:
                piece.write(self.masters[piece.master].detach(), moved[piece.start : piece.start + piece.count])

    def moved(self) -> list[Piece]:
        """This rank's pieces of the parameters that a forward moves (a part's `moving`)."""
        parts = self.module.named_modules()
        names = {f"{prefix}.{name}".lstrip(".") for prefix, part in parts for name in getattr(part, "moving", ())}
        return [piece for piece in self.pieces if piece.name in names]

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; ranks need to agree on gradients in the last one only."""
        yield

    @abstractmethod
    def step(self, decide: Decide) -> None:
        """Update masters and weights, and clear the gradients."""

    def publish(self) -> None:  # noqa: B027 - where masters are the weights there is nothing to do
        """Make the weights follow the masters, which were changed from outside. Collective."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, methods of the module other than its forward find its weights. Collective."""
        yield


class Replicated(Engine):
    """The whole network on every rank: alone, or under torch's DistributedDataParallel."""

    def __init__(self, module: nn.Module, wrapped: nn.Module, optim: Optim, strategy: Strategy) -> None:
        super().__init__(module, wrapped)
        self.optimizer = make_optimizer(optim, module, trained(module))
        self.masters, self.pieces = [value for _, value in trained(module)], whole_pieces(module)
        self._parallel: nn.parallel.DistributedDataParallel | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
            self._parallel = self.wrapped = nn.parallel.DistributedDataParallel(
                wrapped,
                bucket_cap_mb=strategy.bucket_mib,
                gradient_as_bucket_view=True,
                # Otherwise it orders its buckets anew after its first step: a resumed run would sum ranks in another order.
                find_unused_parameters=dist.get_world_size() > 2,
            )
            # Whatever updates a buffer sums over ranks itself. Named otherwise from one torch to the next, hence set here.
            self._parallel.require_forward_param_sync = False

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`."""
        with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
            yield

    def step(self, decide: Decide) -> None:
        """See `Engine.step`."""
        decide([value.grad for _, value in trained(self.module) if value.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FullySharded(Engine):
    """FSDP2: every repeated unit and the rest of the network are sharded along the first dimension of each parameter.

    The optimizer holds the local shards as plain tensors, so that it is the same fused one as everywhere.
    """

    sharded = True

    def __init__(self, module: nn.Module, wrapped: nn.Module, optim: Optim, strategy: Strategy) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(module, wrapped)
        # It warns of views as outputs, which something might change in place; nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        shapes = [value.shape for _, value in trained(module)]
        mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
        self._parts: list[Any] = [
            fully_shard(part, mesh=mesh, reshard_after_forward=strategy.reshard) for part in [*units(module), module]
        ]
        self._parameters = [value for _, value in trained(module)]
        self.masters = [value.to_local().detach() for value in self._parameters]  # type: ignore[attr-defined]
        pieces = [
            _rows(name, shape, local.numel(), index)
            for index, ((name, _), shape, local) in enumerate(zip(trained(module), shapes, self.masters, strict=True))
        ]
        self.pieces = [piece for piece in pieces if piece.count]
        self.optimizer = make_optimizer(optim, module, [(piece.name, self.masters[piece.master]) for piece in self.pieces])
        self.follow()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`."""
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def step(self, decide: Decide) -> None:
        """See `Engine.step`."""
        for value, master in zip(self._parameters, self.masters, strict=True):
            master.grad = None if value.grad is None else value.grad.to_local()  # type: ignore[attr-defined]
        decide([master.grad for master in self.masters if master.grad is not None])
        self.optimizer.step()
        for value, master in zip(self._parameters, self.masters, strict=True):
            value.grad = master.grad = None

    def publish(self) -> None:
        """See `Engine.publish`: what is gathered is freed, and gathered anew when it is needed."""
        for part in self._parts:
            part.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Engine.gathered`: units gather themselves when they are called; the rest stays gathered inside."""
        rest = self._parts[-1]
        rest.unshard()
        try:
            yield
        finally:
            self.publish()


def _rows(name: str, shape: torch.Size, count: int, index: int) -> Piece:
    """This rank's rows of a parameter: every rank has the same number, as far as they go."""
    rows = -(-shape[0] // dist.get_world_size())
    return Piece(name, shape, min(dist.get_rank() * rows, shape[0]) * shape[1:].numel(), count, index)


def make_engine(module: nn.Module, wrapped: nn.Module, optim: Optim, strategy: Strategy, twice: bool) -> Engine:
    """The engine that a strategy means for one network.

    Args:
        module: the plain network, on its device.
        wrapped: the same with its arithmetic around it.
        optim: of its optimizer.
        strategy: of the run.
        twice: its gradient is differentiated again (R1), which shards cannot: under `fsdp` it is whole on every rank, under
            `zero3` only its gradients and moments are sharded.
    """
    if strategy.name == "fsdp" and not twice:
        return FullySharded(module, wrapped, optim, strategy)
    if strategy.name.startswith("zero"):
        from .zero import Zero

        stage = int(strategy.name[-1])
        return Zero(module, wrapped, optim, strategy, min(stage, 2) if twice else stage)
    return Replicated(module, wrapped, optim, strategy)
