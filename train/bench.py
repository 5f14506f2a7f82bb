"""`tokar bench`: the speed of what a user waits for, each fast path beside its plain twin in the same run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.compose import compose
from ..conf.schema import Bench
from ..data.bench import loader_speed
from ..data.files import check_place
from ..errors import UserError, nearest
from ..evaluate.console import say, table
from ..evaluate.protocol import versions, write_whole
from ..evaluate.stopwatch import device_name
from .bench_generators import bench_attention, bench_blocks, bench_sampler, bench_scales, layout_of
from .bench_measure import measure
from .bench_plain import PLAIN, bench_compiled
from .bench_quantizer import bench_quantizer
from .bench_strategies import bench_generator, bench_strategies
from .bench_table import Row, columns_of, overview
from .bench_waits import bench_checkpoint, bench_encode, bench_start, bench_student
from .clock import Clock
from .folder import code_state
from .network import Network
from .profiler import profiled
from .randomness import seed_step
from .stages import check_image_size
from .strategy import Workers
from .telemetry import forget_peak, memory
from .tokenizer import TokenizerStage

SHORT = 1e-3
"""Seconds of each measurement under the profiler: the fewest calls."""


def bench(whats: Sequence[str], overrides: Sequence[str]) -> int:
    """Measure `whats` (all when none is named), print a table and write JSON with commit, versions and device."""
    config: Bench = compose("bench", overrides).typed
    names = [*BENCHES, *APART, "strategies"]
    unknown = [what for what in whats if what not in names]
    if unknown:
        raise UserError("nothing of that name to measure", where=unknown[0], fix=nearest(unknown[0], names))
    path = Path(config.out)
    check_place(path.parent)
    rows: dict[str, Row] = {}
    if "strategies" in whats:
        rows |= bench_strategies(config, overrides)
    workers = Workers(config.strategy)
    workers.launch()
    for what in [what for what in whats if what != "strategies"] if whats else BENCHES:
        forget_peak(workers.device)
        measured = (BENCHES | APART)[what](config, workers)
        rows[what] = {**measured, **memory(workers.device)}
        if workers.rank == 0:
            say(table(what, rows[what]))
        if config.profile:
            say(_profile(what, config, workers, path.parent / "profile"))
    if workers.rank != 0:
        return 0
    say(columns_of(overview(rows)))
    commit, _ = code_state()
    facts = {
        "device": device_name(workers.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit,
    }
    write_whole(path, (json.dumps({**facts, "config": config.model_dump(), "rows": rows}, indent=1) + "\n").encode())
    say(f"written to {path}")
    return 0


def _profile(what: str, config: Bench, workers: Workers, folder: Path) -> str:
    """Measure once more under the profiler; says where trace and table lie."""
    again, place = config.model_copy(update={"seconds": SHORT}), folder / f"{what}-rank-{workers.rank}"
    profiled(lambda: (BENCHES | APART)[what](again, workers), place, workers.device)
    return f"{place}.txt: the dearest operations of {what}; {place.name}.json.gz: the trace, for Perfetto"


def bench_loader(config: Bench, workers: Workers) -> Row:
    """Images per second out of shards, beside webdataset's own pipeline with the same decoder."""
    measured = loader_speed(Path(config.data.path), config.seconds)
    return {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}


def bench_tokenizer(config: Bench, workers: Workers) -> Row:
    """Training steps of tokenizer and discriminator on random images."""
    stage = TokenizerStage(config)
    check_image_size(config.data.image_size, stage.tokenizer.layout)
    for module in stage.frozen:
        module.to(workers.device)
    networks = workers.wrap(stage.trainables, None)
    size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
    batch = {"image": torch.randint(0, 256, size, dtype=torch.uint8, device=workers.device)}
    clock = Clock(10**9, 0, 2 * 10**9, config.batch_size, 10**6)  # past every start step
    tokens = stage.tokenizer.layout.total_tokens

    def step() -> None:
        _train_step(stage.step, batch, clock, networks)

    return measure(config, workers, step, images=config.batch_size, tokens=tokens)


def bench_search(config: Bench, workers: Workers) -> Row:
    """The nearest-code search beside a plain product and argmin, for 65,536 vectors."""
    stream = layout_of(config).streams[0]
    return bench_quantizer(config.seconds, workers.device, codebook_size=stream.vocab_size, dim=stream.embed_dim)


BENCHES: dict[str, Callable[[Bench, Workers], Row]] = {
    "loader": bench_loader,
    "encode": bench_encode,
    "tokenizer": bench_tokenizer,
    "generator": bench_generator,
    "sampler": bench_sampler,
    "scales": bench_scales,
    "blocks": bench_blocks,
    "student": bench_student,
    "attention": bench_attention,
    "checkpoint": bench_checkpoint,
    "start": bench_start,
    "quantizer": bench_search,
    **PLAIN,
}
"""All that is measured when nothing is named; `APART` is when it is."""
APART: dict[str, Callable[[Bench, Workers], Row]] = {"compiled": bench_compiled}


def _train_step(step: Callable[..., Any], batch: dict[str, Tensor], clock: Clock, networks: dict[str, Network]) -> None:
    seed_step(0, clock.step, 0)
    step(batch, clock, networks)
    for network in networks.values():
        network.step(1.0)
