"""The processes of a run: once they are started, engines spread the networks over them.

Networks and stages know nothing of this: a stage calls a `Network`, whatever the strategy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conf.spine import Ema as EmaConfig
from ..conf.spine import Strategy as StrategyConfig
from ..errors import UserError
from ..models.build import pick_device
from ..models.generators.base import Generator
from ..models.kernels import choose
from .cost import AUTOCAST
from .engines import make_engine
from .float8 import check_float8, to_float8
from .network import Network, Trainable
from .pieces import take_stock
from .processes import processes
from .scaler import LossScaler
from .units import compile_units, recompute
from .watch import Watch


class Precise(nn.Module):
    """A network whose forward runs under autocast: weights and whatever wants it stay in float32.

    Args:
        module: the network.
        device: type of its device.
        dtype: of products and convolutions.
    """

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.device, self.dtype = module, device, dtype

    def forward(self, *inputs: Any) -> Any:
        """The network's."""
        with torch.autocast(self.device, self.dtype):
            return self.module(*inputs)


def _check_cpu(config: StrategyConfig) -> None:
    """What `accelerator=auto` finds out only now.

    Raises:
        UserError: something of the strategy needs a GPU.
    """
    what = {"strategy.precision=fp16": config.precision == "fp16", "strategy.offload": config.offload != "none",
            "strategy.backend=nccl": config.backend == "nccl"}  # fmt: skip
    fix = {"strategy.precision=fp16": "set strategy.precision=bf16 or fp32", "strategy.offload": "set strategy.offload=none",
           "strategy.backend=nccl": "set strategy.backend=auto"}  # fmt: skip
    for where, asked in what.items():
        if asked:
            raise UserError("needs a GPU, and none is visible", where=where, fix=fix[where])


class Workers:
    """The processes of a run and their devices."""

    def __init__(self, config: StrategyConfig) -> None:
        device = pick_device(config.accelerator)
        if device.type == "cpu":
            _check_cpu(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.fabric = processes(config, device)
        self.watch = Watch(self.fabric)
        if config.precision == "fp8":
            check_float8(self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    @property
    def rank(self) -> int:
        """This process among all."""
        return int(self.fabric.global_rank)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.fabric.world_size)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.fabric.device

    def launch(self) -> None:
        """Start the other processes, when the strategy has some and no launcher did, and watch over them."""
        self.watch.start()
        self.fabric.launch()

    def wrap(self, trainables: Mapping[str, Trainable], ema: EmaConfig | None) -> dict[str, Network]:
        """Put networks on their devices under their engines, and choose the kernel of their attention."""
        for item in trainables.values():
            if isinstance(item.module, Generator):
                self._choose_attention(item.module)
        return {name: self._network(item, ema) for name, item in trainables.items()}

    def _network(self, item: Trainable, ema: EmaConfig | None) -> Network:
        config, module = self.config, item.module.to(self.device)
        inventory = take_stock(module)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.precision == "fp8":
            to_float8(module)
        if config.recompute != "none":
            recompute(module, config.recompute)
        if config.compile:
            compile_units(module)
        half = AUTOCAST.get(config.precision)
        wrapped = module if half is None else Precise(module, self.device.type, half)
        engine = make_engine(module, wrapped, item.optim, config, item.twice)
        scaler = LossScaler(self.device) if half == torch.float16 else None
        return Network(item, inventory, engine, ema, scaler, self.sum)

    def _choose_attention(self, generator: Generator) -> None:
        half, causal = self.config.precision != "fp32", generator.plan.causal
        generator.attention, why = choose(self.config.attention, self.device, half, causal)
        if self.rank == 0:
            sys.stderr.write(f"attention: {generator.attention} ({why})\n")

    @contextmanager
    def micro_batch(self, networks: Mapping[str, Network], weight: float, *, last: bool) -> Iterator[None]:
        """Inside, gradients are weighted by `weight` and only synchronised between ranks in the last micro-batch."""
        with ExitStack() as stack:
            for network in networks.values():
                network.weight = weight
                stack.enter_context(network.engine.micro_batch(last))
            yield

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in the order of the device's work: nothing waits for it."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on one."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def check_agreement(self, fingerprint: str) -> None:
        """Every rank must have been started with the same config.

        Args:
            fingerprint: SHA-256 of the config, in hex.

        Raises:
            UserError: some ranks have another than rank 0; raised on all of them.
        """
        if self.world == 1:
            return
        marks = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        marks[self.rank] = int(fingerprint[:12], 16)
        theirs = self.sum(marks).tolist()
        if others := [rank for rank, value in enumerate(theirs) if value != theirs[0]]:
            what = f"ranks {', '.join(map(str, others))} were started with another config than rank 0"
            raise UserError(what, where="strategy", fix="start all of them with the same command and the same code")

    def warn(self, line: str) -> None:
        """Tell the user, once for all ranks."""
        if self.rank == 0:
            sys.stderr.write(f"warning: {line}\n")

    def barrier(self) -> None:
        """Wait for every rank."""
        self.fabric.barrier()
