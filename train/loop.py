"""The loop every stage shares: accumulate, clip, step, average, log, evaluate, draw, save, stop at a step boundary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..conf.spine import Loop as LoopConfig
from ..conf.spine import ScheduleConfig
from ..data.stream import Stream
from ..errors import UserError
from ..evaluate.images import save_grid
from .checkpoint import Checkpoints
from .clock import Clock
from .logging import Meters, MetricsFile, Progress, Stopwatch, Wandb, memory
from .network import Network
from .randomness import seed_step
from .schedule import factor, weight_decay
from .signals import StopFlag, Stopped
from .stage import Batch, Stage
from .strategy import Workers

COLLAPSED, SETTLED = 0.02, 100
"""A codebook is called collapsed when, from step `SETTLED` on, the tokens between two logs use less than this share of it,
or, where they are fewer than it has codes (a coarse scale), less than this share of what they could."""

DIVERGED = "lower optim.lr or optim.clip, or look for bad images; the last checkpoint is sound"


@dataclass
class Fit:
    """Everything one training needs, built by `run.py`; `fit()` trains until the clock's total."""

    stage: Stage
    workers: Workers
    networks: dict[str, Network]
    train: Stream
    validate: Stream
    clock: Clock
    loop: LoopConfig
    schedule: ScheduleConfig
    seed: int
    folder: Path
    checkpoints: Checkpoints
    facts: dict[str, Any]
    metrics: MetricsFile
    timing: MetricsFile
    wandb: Wandb
    progress: Progress
    stop: StopFlag
    meters: Meters = field(default_factory=Meters)
    told: set[str] = field(default_factory=set)

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; the checkpoint is written.
        """
        watch = Stopwatch()
        batches = self.train.batches(self.clock.samples)
        while not self.clock.finished:
            asked = time.perf_counter()
            micro_batches = [self._to_device(batch) for batch in next(batches)]
            waited = time.perf_counter() - asked
            self._step(micro_batches)
            self.clock = self.clock.advanced()
            watch.step(self.clock.batch_size, waited)
            self._boundary(watch)
        self.checkpoints.wait()

    def _step(self, micro_batches: list[Batch]) -> None:
        seed_step(self.seed, self.clock.step, self.workers.rank)
        lr_factor = factor(self.schedule, self.clock)
        for number, batch in enumerate(micro_batches, 1):
            count = len(batch["label"])
            weight = count * self.workers.world / self.clock.batch_size  # ranks average, so this makes one mean over the batch
            with self.workers.micro_batch(self.networks, weight, last=number == len(micro_batches)):
                metrics = self.stage.step(batch, self.clock, self.networks)
            self.meters.add({f"train/{name}": value for name, value in metrics.items()}, count)
        for name, network in self.networks.items():
            update = network.step(lr_factor, weight_decay(network.trainable.optim, self.clock))
            if update is None:
                continue
            self.meters.add({f"optim/{name}_grad_norm": update.norm}, 1)
            if network.ema is not None:
                network.ema.update(self.clock.step + 1)
        self.meters.add({"optim/lr_factor": torch.tensor(lr_factor)}, 1)

    def _boundary(self, watch: Stopwatch) -> None:
        """What may happen between two steps, in this order."""
        loop, clock = self.loop, self.clock
        note = ""
        if clock.step % loop.log_every == 0 or clock.finished:
            note = self._log(watch)
        if clock.due(loop.eval_every) or clock.finished:
            note = self._evaluate() or note
        if clock.due(loop.sample_every) or clock.finished:
            self._draw()
        self.progress.update(clock, note)
        self.checkpoints.check()
        stopping = self.workers.any(self.stop.signal is not None)
        if clock.due(loop.save_every) or clock.finished or stopping:
            self._save()
        if stopping and not clock.finished:
            self.checkpoints.wait()
            self.workers.barrier()
            raise Stopped(self.stop.signal or 15, clock.step)

    def _log(self, watch: Stopwatch) -> str:
        values = self.meters.read(self.workers.sum)
        self._check(values)
        speed = watch.read()
        self.metrics.write(self.clock, values)
        self.timing.write(self.clock, {**speed, **memory(self.workers.device)})
        self.wandb.write(self.clock, {**values, **speed})
        shown = {name.removeprefix("train/"): value for name, value in values.items() if name in ("train/loss", "train/usage")}
        parts = [f"{name} {value:.4f}" for name, value in shown.items()] + [f"{speed['images_per_s']:.0f} images/s"]
        return "  ".join(parts)

    def _check(self, values: dict[str, float]) -> None:
        """A loss that is no number ends the run; a codebook that hardly any code of is used is told.

        Raises:
            UserError: the loss is not finite; the checkpoints before it stay.
        """
        if not math.isfinite(values["train/loss"]):
            raise UserError(
                f"the loss is {values['train/loss']} at step {self.clock.step}",
                where=self.folder,
                fix=DIVERGED,
            )
        for name, reach in self.meters.reach.items():
            value = values.get(name, 1.0)
            if value < COLLAPSED * reach and self.clock.step >= SETTLED and name not in self.told:
                self.told.add(name)
                self.progress.say(f"warning: {name} is {value:.4f} at step {self.clock.step}: the codebook has collapsed; "
                                  "try tokenizer.quantizer.restart_after=100 or a lower optim.lr")  # fmt: skip

    def _evaluate(self) -> str:
        meters = Meters()
        with self._averaged():
            for batch in self.validate.once(self.loop.eval_samples):
                batch = self._to_device(batch)
                metrics = self.stage.evaluate(batch, self.networks)
                meters.add({f"val/{name}": value for name, value in metrics.items()}, len(batch["label"]))
        values = meters.read(self.workers.sum)
        self.metrics.write(self.clock, values)
        self.wandb.write(self.clock, values)
        return "  ".join(f"{name} {value:.4f}" for name, value in values.items())

    def _draw(self) -> None:
        """On every rank, since they may hold a part of the network each; the first one's pictures are kept."""
        with self._averaged(), self._gathered():
            batch = self._to_device(next(self.validate.once(32)))
            pictures = self.stage.draw(batch, self.networks)
        if self.workers.rank != 0:
            return
        for name, images in pictures.items():
            path = self.folder / "samples" / f"step-{self.clock.step:08d}-{name}.png"
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)
            self.wandb.write_picture(self.clock, name, path)

    def _save(self) -> None:
        self._check_weights()
        self.metrics.sync()
        state = {
            "step": self.clock.step, "samples": self.clock.samples, "seed": self.seed, "world": self.workers.world,
            "main": next(iter(self.networks)), **self.facts,
        }  # fmt: skip
        stall = self.checkpoints.save(self.networks, self.meters.sums, state)
        self.timing.write(self.clock, {"save_stall_ms": 1000 * stall})

    def _check_weights(self) -> None:
        """Weights that are no numbers are not saved, so that the checkpoints before them stay the newest.

        Raises:
            UserError: some are not finite.
        """
        found = [name for name, network in self.networks.items() if self.workers.any(not _finite(network.engine.masters))]
        if found:
            raise UserError(
                f"the {found[0]}'s weights are not finite at step {self.clock.step}", where=self.folder, fix=DIVERGED
            )

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.workers.device, non_blocking=True) for name, value in batch.items()}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside, methods of the networks other than their forward can be called; they run uncompiled, since shapes change."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for network in self.networks.values():
                stack.enter_context(network.engine.gathered())
            yield

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside: averaged weights where there are some, eval mode, no gradient, and random numbers of its own."""
        modes = {name: network.module.training for name, network in self.networks.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for network in self.networks.values():
                network.module.eval()
                if network.ema is not None:
                    stack.enter_context(network.ema.applied())
            yield
        for name, network in self.networks.items():
            network.module.train(modes[name])


def _finite(masters: list[torch.Tensor]) -> bool:
    """All of them are finite: read off their norms, in one synchronisation."""
    norms = torch._foreach_norm([master.detach() for master in masters])
    return bool(torch.stack(norms).isfinite().all())
