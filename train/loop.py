"""The loop every stage shares: accumulate, clip, step, average, log, evaluate, draw, save, stop at a step boundary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..conf.spine import Loop as LoopConfig
from ..conf.spine import ScheduleConfig
from ..data.stream import Stream
from ..evaluate.images import Picture
from . import checkpoint
from .checkpoint import Checkpoints
from .clock import Clock
from .drawn import save_counts
from .guard import Diverged, Guard, Verdict
from .logging import Meters, MetricsFile, Progress, Wandb
from .network import Network
from .randomness import seed_step
from .schedule import factor, weight_decay
from .signals import StopFlag, Stopped
from .stage import Batch, Stage
from .strategy import Workers
from .telemetry import Telemetry, note

COLLAPSED, SETTLED = 0.02, 100
"""A codebook is called collapsed when, from step `SETTLED` on, the tokens between two logs use less than this share of it,
or, where they are fewer than it has codes (a coarse scale), less than this share of what they could."""

DIVERGED = "lower optim.lr or optim.clip, or look for bad images"


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
    telemetry: Telemetry
    stop: StopFlag
    guard: Guard
    meters: Meters = field(default_factory=Meters)
    told: set[str] = field(default_factory=set)
    unsaved: bool = False
    """A checkpoint is due, and waits for the end of a row of bad steps."""

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; the checkpoint is written.
            Diverged: steps went wrong that the guard could not get past.
        """
        self.workers.watch.expect_steps(self.folder, self.guard.config.hang_after)
        self.telemetry.attach(self.networks, self.clock)
        batches = self.train.batches(self.clock.samples)
        while not self.clock.finished:
            asked = self.telemetry.begin()
            micro_batches = [self._to_device(batch) for batch in next(batches)]
            waited = time.perf_counter() - asked
            self._step(micro_batches)
            self.clock = self.clock.advanced()
            self.telemetry.step(self.clock, waited)
            self._boundary()
        self.checkpoints.wait()

    def _step(self, micro_batches: list[Batch]) -> None:
        seed_step(self.seed, self.clock.step, self.workers.rank)
        lr_factor = factor(self.schedule, self.clock)
        step = Meters()
        self.guard.begin()
        for number, batch in enumerate(micro_batches, 1):
            count = len(batch["label"])
            weight = count * self.workers.world / self.clock.batch_size  # ranks average, so this makes one mean over the batch
            with self.workers.micro_batch(self.networks, weight, last=number == len(micro_batches)):
                metrics = self.stage.step(batch, self.clock, self.networks)
            self.telemetry.micro_batch(batch, metrics, self.clock)
            step.add({f"train/{name}": value for name, value in metrics.items()}, count)
        loss = step.sums["train/loss"][0] / self.clock.batch_size
        veto = self.guard.judge(loss, stop=self.stop.signal is not None)
        updates = {}
        for name, network in self.networks.items():
            updates[name] = update = network.step(lr_factor, weight_decay(network.trainable.optim, self.clock), veto)
            if update is None:
                continue
            step.add({f"optim/{name}_grad_norm": update.norm}, 1)
            if network.ema is not None:
                network.ema.update(self.clock.step + 1)
        self.meters.add_step(step, bad=self.guard.conclude(self.clock.advanced(), updates))
        self.meters.add({"optim/lr_factor": torch.tensor(lr_factor)}, 1)

    def _boundary(self) -> None:
        """What may happen between two steps, in this order."""
        loop, clock = self.loop, self.clock
        evaluating, drawing = (clock.due(every) or clock.finished for every in (loop.eval_every, loop.sample_every))
        self.unsaved |= clock.due(loop.save_every) or clock.finished
        self.workers.watch.step(long=self.unsaved or evaluating or drawing)
        self.checkpoints.check()
        found = self.guard.read(clock, everything=self.unsaved)
        for verdict in found.bad:
            self._tell(verdict.clock, "skip", verdict.reason)
        if found.trip is not None:
            self._go_back(found.trip)
        else:
            said = self._log() if clock.step % loop.log_every == 0 or clock.finished else ""
            with self.telemetry.outside():
                if evaluating:
                    said = self._evaluate() or said
                if drawing:
                    self._draw()
                self.progress.update(clock, said)
                if found.stop or clock.finished or (self.unsaved and not found.bad_at(clock)):
                    self._save()
        if found.stop and not self.clock.finished:
            self.checkpoints.wait()
            self.workers.barrier()
            raise Stopped(self.stop.signal or 15, self.clock.step)

    def _tell(self, clock: Clock, event: str, reason: str, **more: int) -> None:
        """Write down what happened to the run, and say it; a stop is said by the error that it ends with."""
        self.metrics.write(clock, {"event": event, "reason": reason, **more})
        said = {"skip": "the update is left out", "rollback": f"back to step {more.get('to')}, with the data that follow"}
        if event in said:
            self.progress.say(f"warning: {self.folder}: step {clock.step}: {reason}; {said[event]}")

    def _go_back(self, trip: Verdict) -> None:
        """Go on from the last checkpoint before a row of bad steps, with the data behind them.

        Raises:
            Diverged: there is none, or that did not help before.
        """
        self.workers.watch.step(long=True)
        self.checkpoints.wait()
        self.workers.barrier()  # rank 0 has made the last one count
        row = f"{trip.row} steps in a row went wrong"
        saved = self.checkpoints.newest(self.workers.warn, last=trip.clock.step - trip.row)
        if saved is None or self.guard.gives_up:
            tried = (
                "there is no checkpoint from before them" if saved is None else f"going back to step {saved.step} was in vain"
            )
            self._tell(self.clock, "stop", f"{row}, and {tried}")
            raise Diverged(f"{row} up to step {trip.clock.step} ({trip.reason}), and {tried}", where=self.folder, fix=DIVERGED)
        self.meters.sums = checkpoint.restore(saved, self.networks, self.workers)
        self.guard.go_back(trip.clock, saved.state.get("guard"))
        self._tell(self.clock, "rollback", row, to=saved.step)
        self.metrics.sync()
        self.checkpoints.go_back(saved, {"samples": self.clock.samples, "guard": self.guard.facts()})
        self.clock, self.unsaved = replace(self.clock, step=saved.step), False

    def _log(self) -> str:
        values = self.meters.read(self.workers.sum)
        self._warn_of_collapse(values)
        speed = self.telemetry.read()
        self.metrics.write(self.clock, values)
        self.timing.write(self.clock, speed)
        self.wandb.write(self.clock, {**values, **speed})
        shown = {name.removeprefix("train/"): value for name, value in values.items() if name in ("train/loss", "train/usage")}
        return "  ".join([*(f"{name} {value:.4f}" for name, value in shown.items()), note(speed)])

    def _warn_of_collapse(self, values: dict[str, float]) -> None:
        """Tell of a codebook that hardly any code of is used."""
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
        if self.workers.rank == 0 and meters.histograms:
            save_counts({name.removeprefix("val/"): counts for name, counts in meters.histograms.items()}, self.folder)
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
        for name, drawn in pictures.items():
            path = self.folder / "samples" / f"step-{self.clock.step:08d}-{name}.png"
            path.parent.mkdir(exist_ok=True)
            (drawn if isinstance(drawn, Picture) else Picture(drawn)).save(path)
            self.wandb.write_picture(self.clock, name, path)

    def _save(self) -> None:
        self.unsaved = False
        self.metrics.sync()
        state = {
            "step": self.clock.step, "samples": self.clock.samples, "seed": self.seed, "world": self.workers.world,
            "main": next(iter(self.networks)), "guard": self.guard.facts(), **self.facts,
        }  # fmt: skip
        stall = self.checkpoints.save(self.networks, self.meters.sums, state)
        self.timing.write(self.clock, {"save_stall_ms": 1000 * stall})

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.workers.device, non_blocking=True) for name, value in batch.items()}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """See `Network.gathered`, of all networks."""
        with ExitStack() as stack:
            for network in self.networks.values():
                stack.enter_context(network.gathered())
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
