"""The speed and memory of training a generator, under every strategy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conf.schema import Bench
from ..conf.spine import Ema
from ..errors import UserError
from ..evaluate.console import say, table
from ..evaluate.stopwatch import per_second
from ..models.generators.base import Generator
from .bench_generators import generator_of, layout_of
from .bench_measure import costs
from .bench_table import Row
from .clock import Clock
from .cost import modules_of, step_cost
from .footprint import fixed_bytes, footprint, size_of
from .network import Network, Trainable
from .profiler import most_held
from .stage import Batch, Networks
from .strategy import Workers

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


class GeneratorSteps:
    """What trains a generator on random codes, as a stage does."""

    def __init__(self, config: Bench, generator: Generator) -> None:
        self.trainables = {"generator": Trainable(generator, config.generator, config.optim)}
        self.frozen: list[nn.Module] = []

    def step(self, batch: Batch, clock: Clock, networks: Networks) -> dict[str, Tensor]:
        """See `Steps.step`."""
        losses: dict[str, Tensor] = networks["generator"](batch["codes"], batch["label"])
        networks["generator"].backward(losses["loss"])
        return losses


def bench_generator(config: Bench, workers: Workers) -> Row:
    """Training steps of the generator on random codes, under the strategy; `batch_size` is that of a rank.

    `held_mib` is the most that torch's allocator held from the building of the network to the second step; `paper_mib` is what
    `tokar estimate` says of it.
    """
    device, strategy = workers.device, config.strategy
    tokens = math.prod(config.grid)
    paper = GeneratorSteps(config, generator_of(config))
    shapes = {"codes": ((config.batch_size, tokens), torch.int64), "label": ((config.batch_size,), torch.int64)}
    cost = step_cost(paper, strategy, shapes)
    sizes = [size_of(item, averages=True) for item in paper.trainables.values()]
    planned = footprint(strategy, workers.world, sizes, fixed_bytes(modules_of(paper)), cost)
    del paper

    def begin() -> Callable[[], None]:
        step = training(config, workers)[1]
        step()
        step()
        return step

    step, held = most_held(begin, device)
    rate = per_second(step, config.seconds, device, workers.any)
    samples = rate * config.batch_size * workers.world
    row = {"step_ms": 1000 / rate, "steps_per_s": rate, "images_per_s": samples, "tokens_per_s": samples * tokens}
    return {**row, **costs(cost.flops, rate, config.batch_size, workers), "held_mib": held / 2**20,
            "paper_mib": planned.total / 2**20}  # fmt: skip


def training(config: Bench, workers: Workers) -> tuple[dict[str, Network], Callable[[], None]]:
    """The generator on the ranks, and a training step of it on random codes."""
    device = workers.device
    stage = GeneratorSteps(config, generator_of(config))
    networks = workers.wrap(stage.trainables, Ema())
    codes = torch.randint(layout_of(config).vocab_size, (config.batch_size, math.prod(config.grid)), device=device)
    batch = {"codes": codes, "label": torch.randint(config.num_classes, (config.batch_size,), device=device)}
    clock = Clock(0, 0, 10**9, config.batch_size * workers.world, 10**6)

    def step() -> None:
        with workers.micro_batch(networks, 1.0, last=True):
            stage.step(batch, clock, networks)
        for network in networks.values():
            network.step(1.0)
            if network.ema is not None:
                network.ema.update(1)

    return networks, step


def bench_strategies(config: Bench, overrides: Sequence[str]) -> dict[str, Row]:
    """`bench generator` under every strategy, one process for each rank: `strategy.devices` of them, two when not given."""
    kept = [
        text for text in overrides if not text.startswith(("strategy=", "strategy.devices=", "strategy.channels_last=", "out="))
    ]
    ranks = max(2, config.strategy.devices)
    rows: dict[str, Row] = {}
    for name in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "row.json"
            more = [f"strategy={name}", f"strategy.devices={1 if name == 'single' else ranks}", f"out={out}"]
            ended = subprocess.run([sys.executable, "-m", "tokar.cli", "bench", "generator", *kept, *more],
                                   capture_output=True, text=True, check=False)  # fmt: skip
            if ended.returncode:
                said = " ".join(ended.stderr.split())[-300:]
                raise UserError(
                    f"{name} failed: {said}", where="bench strategies", fix=f"tokar bench generator strategy={name}"
                )
            rows[name] = json.loads(out.read_text())["rows"]["generator"]
        say(table(name, rows[name]))
    return rows
