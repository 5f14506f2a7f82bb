"""How the work is spread: Fabric wraps the networks, which know nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ..conf.spine import Ema as EmaConfig
from ..conf.spine import Optim
from ..conf.spine import Strategy as StrategyConfig
from ..errors import UserError
from ..models.build import pick_device
from ..models.generators.base import Generator
from ..models.kernels import choose
from .ema import Ema
from .optim import make_optimizer
from .rendezvous import environment

_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Trainable:
    """A network that a stage wants trained.

    Args:
        module: the plain network.
        node: its config node, saved beside the weights.
        optim: who optimises it.
        ema: whether its weights are averaged, when the run averages any.
        facts: what else a reader of the weights must know (layout, classes, …), saved beside them.
    """

    module: nn.Module
    node: dict[str, Any]
    optim: Optim
    ema: bool = True
    facts: dict[str, Any] | None = None


class Network:
    """A network in training: the plain module, its wrapped form, its optimizer and its average."""

    def __init__(self, fabric: Fabric, trainable: Trainable, ema: EmaConfig | None, strategy: StrategyConfig) -> None:
        self._fabric, self.trainable, self.module = fabric, trainable, trainable.module
        if strategy.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(trainable.optim, self.module)
        if strategy.compile:
            self.module.compile()
        self.wrapped, self._stepper = fabric.setup(self.module, self.optimizer)
        self.ema = Ema(self.module, ema) if ema is not None and trainable.ema else None
        self._weight, self._pending = 1.0, False

    def __call__(self, *inputs: Any) -> Any:
        """Forward through the wrapper: precision, gradient synchronisation."""
        return self.wrapped(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a mean over this rank's micro-batch) to the step's."""
        self._fabric.backward(loss * self._weight, model=self.wrapped)
        self._pending = True

    def step(self, lr_factor: float, weight_decay: float | None = None) -> Tensor | None:
        """Clip, update, clear. Returns the gradient norm before clipping; `None` when there was no backward since.

        Args:
            lr_factor: of the configured learning rate.
            weight_decay: of the parameters that are decayed; `None`: as it was.
        """
        if not self._pending:
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainable.optim.lr * lr_factor
            if weight_decay is not None and group["decayed"]:
                group["weight_decay"] = weight_decay
        clip = self.trainable.optim.clip or float("inf")
        norm = self._fabric.clip_gradients(self.wrapped, self._stepper, max_norm=clip, error_if_nonfinite=False)
        self._stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = False
        return norm


class Workers:
    """The processes of a run and their devices."""

    def __init__(self, config: StrategyConfig) -> None:
        pick_device(config.accelerator)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        found = environment(config.nodes, config.devices)
        self.fabric = Fabric(
            plugins=found,
            accelerator=config.accelerator,
            strategy="ddp" if config.name == "ddp" else "auto",
            devices=config.devices,
            num_nodes=config.nodes,
            precision=_PRECISION[config.precision],  # type: ignore[arg-type]
        )
        if self.fabric.device.type == "cuda":
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
        """Start the other processes, when the strategy has some and no launcher did."""
        self.fabric.launch()

    def wrap(self, trainables: dict[str, Trainable], ema: EmaConfig | None) -> dict[str, Network]:
        """Put networks on their devices under their optimizers, and choose the kernel of their attention."""
        for item in trainables.values():
            if isinstance(item.module, Generator):
                self._choose_attention(item.module)
        return {name: Network(self.fabric, item, ema, self.config) for name, item in trainables.items()}

    def _choose_attention(self, generator: Generator) -> None:
        half, causal = self.config.precision != "fp32", generator.plan.causal
        generator.attention, why = choose(self.config.attention, self.device, half, causal)
        if self.rank == 0:
            sys.stderr.write(f"attention: {generator.attention} ({why})\n")

    @contextmanager
    def micro_batch(self, networks: dict[str, Network], weight: float, *, last: bool) -> Iterator[None]:
        """Inside, gradients are weighted by `weight` and only synchronised between ranks in the last micro-batch."""
        with ExitStack() as stack:
            for network in networks.values():
                network._weight = weight
                stack.enter_context(self.fabric.no_backward_sync(network.wrapped, enabled=not last))
            yield

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        return self.fabric.all_reduce(value, reduce_op="sum") if self.world > 1 else value  # type: ignore[return-value]

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
