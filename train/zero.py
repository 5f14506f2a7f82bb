"""DeepSpeed's ZeRO as an engine: moments (1), gradients (2) and weights (3) in shards.

DeepSpeed partitions, gathers and reduces. It neither clips nor scales here, and its own checkpoints are not used: their
loads into another world are silently wrong in places (docs/decisions.md). What is private to it is touched in this file only.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conf.spine import Optim, Strategy
from ..errors import UserError
from .engines import MIB, Decide, Engine
from .optim import make_optimizer
from .pieces import Piece, trained


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, without compiling anything of its own.

    Raises:
        UserError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError("ZeRO needs deepspeed", where="strategy", fix="pip install 'tokar[deepspeed]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It speaks to torch by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # serves inference only, and wants a compiler
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Zero(Engine):
    """A network under ZeRO of one stage."""

    sharded = True

    def __init__(self, module: nn.Module, wrapped: nn.Module, optim: Optim, strategy: Strategy, stage: int) -> None:
        super().__init__(module, wrapped)
        self.stage, self.offload = stage, strategy.offload == "optimizer"
        self._library = _deepspeed(next(module.parameters()).device)
        self._engine, self.optimizer, _, _ = self._library.initialize(
            model=wrapped, optimizer=make_optimizer(optim, module, trained(module)), config=self._config(strategy)
        )
        self._zero = self._engine.optimizer
        self.optimizer = self._zero.optimizer
        self._decide: Decide | None = None
        self._norm_of_library = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        setattr(self._zero, self._norm_of_library, self._when_it_asks_for_the_norm)
        flat = self._zero.fp32_partitioned_groups_flat if stage == 3 else self._zero.single_partition_of_fp32_groups
        self.masters = list(flat)
        self.pieces = self._pieces_of_three() if stage == 3 else self._pieces_of_two()

    def _config(self, strategy: Strategy) -> dict[str, Any]:
        elements = strategy.bucket_mib * MIB // 4
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements,
            "overlap_comm": dist.get_backend() == "nccl",
            "round_robin_gradients": False,
        }
        if self.stage == 3:
            zero |= {"stage3_prefetch_bucket_size": elements, "stage3_param_persistence_threshold": strategy.persistent}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {
            # What it does with these numbers is switched off: micro-batches, clipping and scaling are ours.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }

    def __call__(self, *inputs: Any) -> Any:
        """See `Engine.__call__`."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def step(self, decide: Decide) -> None:
        """See `Engine.step`."""
        self._decide = decide
        self._engine.step()

    def _when_it_asks_for_the_norm(self) -> Any:
        """Called by DeepSpeed between reduction and update: the decision is ours, the norm that it gets is none."""
        assert self._decide is not None
        self._decide(self._gradients())
        harmless = torch.ones((), device="cpu")
        return [harmless] if self.stage == 3 else harmless

    def _gradients(self) -> list[Tensor]:
        if self.offload:
            return [master.grad for master in self.masters if master.grad is not None]
        found = self._zero.averaged_gradients
        return [gradient for group in found.values() if group is not None for gradient in group if gradient is not None]

    def _pieces_of_two(self) -> list[Piece]:
        """Groups are flattened in their own order, padded and cut into one partition for each rank."""
        names = {id(value): (name, value.shape) for name, value in trained(self.module)}
        pieces = []
        for index, group in enumerate(self._zero.bit16_groups):
            size = self.masters[index].numel()
            first, place = dist.get_rank() * size, 0
            for parameter in group:
                name, shape = names[id(parameter)]
                low, high = max(first, place), min(first + size, place + shape.numel())
                if low < high:
                    pieces.append(Piece(name, shape, low - place, high - low, index, low - first))
                place += shape.numel()
        return pieces

    def _pieces_of_three(self) -> list[Piece]:
        """Every parameter is padded and cut by itself; a sub-group's shards lie one behind the other."""
        names = {id(value): name for name, value in trained(self.module)}
        pieces = []
        for index, group in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in group:
                length = parameter.partition_numel()
                start = dist.get_rank() * length
                count = min(length, parameter.ds_numel - start)
                if count < length:  # padding comes with whatever was in memory
                    self.masters[index].detach()[offset + max(count, 0) : offset + length].zero_()
                if count > 0:
                    pieces.append(Piece(names[id(parameter)], parameter.ds_shape, start, count, index, offset))
                offset += length
        return pieces

    @torch.no_grad()
    def publish(self) -> None:
        """See `Engine.publish`."""
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for weights, masters in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            weights.copy_(masters)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Engine.gathered`: layers gather themselves when they are called; what a composite holds itself is gathered."""
        own = [
            parameter
            for part in self.module.modules()
            if next(part.children(), None) is not None
            for parameter in part.parameters(recurse=False)
        ]
        with self._library.zero.GatheredParameters(own, enabled=self.stage == 3 and bool(own)):
            yield
