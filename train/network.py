"""A network in training: its engine, its optimizer's decisions, its average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conf.spine import Ema as EmaConfig
from ..conf.spine import Optim
from .ema import Ema
from .engines import Engine
from .pieces import Inventory
from .scaler import LossScaler

Sum = Callable[[Tensor], Tensor]
"""Sum over ranks, on the device."""


@dataclass(frozen=True)
class Trainable:
    """A network that a stage wants trained.

    Args:
        module: the plain network.
        node: its config node, saved beside the weights.
        optim: who optimises it.
        ema: whether its weights are averaged, when the run averages any.
        facts: what else a reader of the weights must know (layout, classes, …), saved beside them.
        twice: its gradient with respect to its input is differentiated again (R1).
    """

    module: nn.Module
    node: dict[str, Any]
    optim: Optim
    ema: bool = True
    facts: dict[str, Any] | None = None
    twice: bool = False


@dataclass(frozen=True)
class Update:
    """What became of a step, on the device.

    Args:
        norm: of the gradient before clipping, over all ranks.
        skipped: 1 where the update was left out because of the veto or a gradient that is no number; an overflow of fp16
            that the loss scale answers to is none of these.
    """

    norm: Tensor
    skipped: Tensor


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, weights that are trained count as frozen."""
    weights = [value for value in module.parameters() if value.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


class Network:
    """A network in training.

    Args:
        trainable: what the stage wants.
        inventory: of its module.
        engine: it under the run's strategy.
        ema: of its average; `None`: none is kept.
        scaler: of the loss, in fp16.
        total: sum over ranks.
    """

    def __init__(
        self,
        trainable: Trainable,
        inventory: Inventory,
        engine: Engine,
        ema: EmaConfig | None,
        scaler: LossScaler | None,
        total: Sum,
    ) -> None:
        self.trainable, self.engine, self.module = trainable, engine, trainable.module
        self.inventory = inventory
        self.optimizer, self.scaler, self._sum = engine.optimizer, scaler, total
        self.ema = Ema(engine, ema) if ema is not None and trainable.ema else None
        self.weight = 1.0
        """Of this micro-batch in the mean over the batch, times the number of ranks, which average."""
        self._pending, self._update = False, Update(torch.empty(0), torch.empty(0))
        self._moved, self._before = engine.moved(), list[Tensor]()

    def __call__(self, *inputs: Any) -> Any:
        """Forward through the engine: arithmetic in the run's precision, gradients in step over ranks."""
        return self.engine(*inputs)

    @contextmanager
    def apart(self) -> Iterator[Callable[..., Any]]:
        """Inside, its forward in another network's loss: gradients, to be taken inside, pass to the inputs alone."""
        with held(self.module):
            yield self.engine.plain

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, methods of the module other than its forward can be called. Uncompiled, since shapes change. Collective."""
        with torch.compiler.set_stance("force_eager"), self.engine.gathered():
            yield

    def rest(self) -> dict[str, Tensor]:
        """What is in the module's state beside trained parameters: buffers, frozen weights."""
        known = {name for names in self.inventory.names.values() for name in names}
        return {name: value for name, value in self.module.state_dict().items() if name not in known}

    def remember(self) -> None:
        """Keep what a forward moves, before a step's first one: an update that is left out puts it back; without this, not."""
        self._before = [piece.read(self.engine.masters[piece.master]) for piece in self._moved]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a mean over this rank's micro-batch) to the step's."""
        scale = self.weight if self.scaler is None else self.weight * self.scaler.scale
        self.engine.backward(loss * scale)
        self._pending = True

    def step(self, lr_factor: float, weight_decay: float | None = None, veto: Tensor | None = None) -> Update | None:
        """Clip, update, clear; nothing waits for the device. `None` when there was no backward since.

        Args:
            lr_factor: of the configured learning rate.
            weight_decay: of the parameters that are decayed; `None`: as it was.
            veto: not 0: leave weights, moments and counts as they are.
        """
        if not self._pending:
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainable.optim.lr * lr_factor
            if weight_decay is not None and group["decayed"]:
                group["weight_decay"] = weight_decay
        self.engine.step(lambda gradients: self._decide(gradients, veto))
        self._pending = False
        return self._update

    @torch.no_grad()
    def _decide(self, gradients: Sequence[Tensor], veto: Tensor | None) -> None:
        """Tell the fused optimizer by what to divide the gradients, and whether to leave the update out."""
        norm = self._norm(gradients)
        clip = self.trainable.optim.clip
        excess = (norm / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
        bad = ~norm.isfinite()
        skipped = bad if veto is None else bad | (veto.to(bad.device) != 0)
        scale = torch.where(bad, 1.0, excess)
        if self.scaler is not None:
            scale = scale * self.scaler.scale.to(scale.device)
        # The names are torch's own: fused optimizers look for these two attributes.
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, skipped.float()  # type: ignore[attr-defined]
        for piece, before in zip(self._moved, self._before, strict=False):
            master = self.engine.masters[piece.master]
            piece.write(master, torch.where(skipped.to(master.device), before, piece.read(master)))
        if self.scaler is not None:
            skipped = skipped & ~(bad & self.scaler.answers().to(bad.device))
            self.scaler.update(bad)
        self._update = Update(norm, skipped.float())

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of the gradient, unscaled, over all shards."""
        if gradients:
            square = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        else:
            square = torch.zeros((), device=self.engine.masters[0].device)
        if self.engine.sharded:
            square = self._sum(square)
        norm = square.sqrt()
        return norm if self.scaler is None else norm / self.scaler.scale.to(norm.device)
