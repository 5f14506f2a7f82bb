"""`tokar bench`: the speed of what a user waits for, each fast path beside its plain twin in the same run."""

from __future__ import annotations

import json
import math
import time
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
from ..models.build import build
from ..models.generators.base import Generator
from ..models.generators.next_scale import NextScale
from ..models.generators.next_token import NextToken
from ..models.samplers.decode import sample
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.conv import ConvDecoder, ConvEncoder
from ..models.tokenizers.layout import TokenLayout
from ..models.tokenizers.multiscale import MultiScaleVQ
from ..models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from .bench_quantizer import bench_quantizer
from .clock import Clock
from .folder import code_state
from .logging import forget_peak, memory
from .network import Network, Trainable
from .randomness import seed_step
from .stages import check_image_size, fill, sizes_of
from .strategy import Workers
from .tokenizer import TokenizerStage

Row = dict[str, float]
VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def bench(whats: Sequence[str], overrides: Sequence[str]) -> int:
    """Measure `whats` (all when none is named), print a table and write JSON with commit, versions and device."""
    config: Bench = compose("bench", overrides).typed
    unknown = [what for what in whats if what not in BENCHES]
    if unknown:
        raise UserError("nothing of that name to measure", where=unknown[0], fix=nearest(unknown[0], BENCHES))
    workers = Workers(config.strategy)
    path = Path(config.out)
    check_place(path.parent)
    rows: dict[str, Row] = {}
    for what in whats or BENCHES:
        forget_peak(workers.device)
        measured = BENCHES[what](config, workers)
        rows[what] = {**measured, **memory(workers.device)}
        say(table(what, rows[what]))
    commit, _ = code_state()
    facts = {
        "device": _device_name(workers.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit,
    }
    write_whole(path, (json.dumps({**facts, "config": config.model_dump(), "rows": rows}, indent=1) + "\n").encode())
    say(f"written to {path}")
    return 0


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
    rate = _rate(lambda: _train_step(stage.step, batch, clock, networks), config.seconds, workers.device)
    return {"step_ms": 1000 / rate, "steps_per_s": rate, "images_per_s": rate * config.batch_size}


def bench_generator(config: Bench, workers: Workers) -> Row:
    """Training steps of the generator on random codes."""
    generator = _generator(config, workers)
    networks = workers.wrap({"generator": Trainable(generator, config.generator, config.optim)}, None)
    tokens = math.prod(config.grid)
    codes = torch.randint(generator.vocab_size, (config.batch_size, tokens), device=workers.device)
    labels = torch.randint(config.num_classes, (config.batch_size,), device=workers.device)

    def step() -> None:
        networks["generator"].backward(networks["generator"](codes, labels)["loss"])
        networks["generator"].step(1.0)

    rate = _rate(step, config.seconds, workers.device)
    samples = rate * config.batch_size
    return {"steps_per_s": rate, "images_per_s": samples, "tokens_per_s": samples * tokens}


def bench_sampler(config: Bench, workers: Workers) -> Row:
    """Sampling with the KV cache and without it, the same guidance and seeds."""
    generator = _generator(config, workers).to(workers.device).eval()
    labels = torch.arange(config.sample_batch, device=workers.device) % config.num_classes
    sampling = config.sampling.model_dump(exclude={"cache"})
    codes: dict[bool, Tensor] = {}

    def speed(cache: bool) -> float:
        def draw() -> None:
            codes[cache] = sample(generator, labels, seed=0, cache=cache, **sampling)

        return _rate(draw, config.seconds, workers.device) * config.sample_batch

    cached, uncached = speed(True), speed(False)
    if not torch.equal(codes[True], codes[False]):
        raise UserError("cached and uncached sampling gave different tokens", where="bench sampler", fix="report this as a bug")
    return {"cached_images_per_s": cached, "uncached_images_per_s": uncached, "ratio": cached / uncached}


def bench_scales(config: Bench, workers: Workers) -> Row:
    """Next-scale sampling beside next-token sampling of the same finest grid, by transformers of one size, both cached."""
    device, size = workers.device, {key: config.generator[key] for key in ("dim", "layers", "heads") if key in config.generator}
    scales = _pyramid(config.grid)
    torch.manual_seed(0)
    tokenizer = _scale_tokenizer(scales)
    sizes = sizes_of(tokenizer.layout)
    known = {"num_classes": config.num_classes, "vocab_size": sizes["vocab_size"]}
    by_scale = NextScale(**known, grids=sizes["grids"], embed_dim=sizes["embed_dim"], **size).to(device).eval()
    by_scale.bind(tokenizer.to(device).eval())
    by_token = NextToken(**known, grid=config.grid, **size).to(device).eval()
    labels = torch.arange(config.sample_batch, device=device) % config.num_classes
    sampling = config.sampling.model_dump(exclude={"cache"})

    def speed(generator: Generator) -> float:
        def draw() -> None:
            sample(generator, labels, seed=0, **sampling)

        return _rate(draw, config.seconds, device) * config.sample_batch

    token, scale = speed(by_token), speed(by_scale)
    return {
        "next_token_images_per_s": token,
        "next_scale_images_per_s": scale,
        "next_token_steps": by_token.plan.n_units,
        "next_scale_steps": by_scale.plan.n_units,
        "next_scale_tokens": by_scale.plan.n_tokens,
        "ratio": scale / token,
    }


def _pyramid(grid: tuple[int, int]) -> list[list[int]]:
    """VAR's scales, shrunk to end with `grid`."""
    share = [side / VAR_SIDES[-1] for side in VAR_SIDES]
    pairs = [tuple(max(1, round(side * part)) for side in grid) for part in share]
    return [list(pair) for pair in dict.fromkeys(pairs)]  # small grids repeat some


def _scale_tokenizer(scales: Sequence[Sequence[int]]) -> MultiScaleVQ:
    """A multi-scale tokenizer with VAR's codes and no more of networks than a sampler asks for."""
    half: dict[str, Any] = {"width": 32, "multipliers": [1], "blocks": 1, "z_channels": 32}
    return MultiScaleVQ(ConvEncoder(**half), ConvDecoder(**half), MultiScaleQuantizer(scales=scales))


def bench_search(config: Bench, workers: Workers) -> Row:
    """The nearest-code search beside a plain product and argmin, for 65,536 vectors."""
    stream = _layout(config).streams[0]
    return bench_quantizer(config.seconds, workers.device, codebook_size=stream.vocab_size, dim=stream.embed_dim)


BENCHES: dict[str, Callable[[Bench, Workers], Row]] = {
    "loader": bench_loader,
    "tokenizer": bench_tokenizer,
    "generator": bench_generator,
    "sampler": bench_sampler,
    "scales": bench_scales,
    "quantizer": bench_search,
}


def _generator(config: Bench, workers: Workers) -> Generator:
    known = {"vocab_size": _layout(config).vocab_size, "num_classes": config.num_classes, "grid": config.grid}
    torch.manual_seed(0)
    generator: Generator = build(fill(config.generator, known))
    for parameter in generator.parameters():  # a zero-initialised head makes all tokens alike
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return generator


def _layout(config: Bench) -> TokenLayout:
    with torch.device("meta"):
        tokenizer: Tokenizer = build(config.tokenizer)
    return tokenizer.layout


def _train_step(step: Callable[..., Any], batch: dict[str, Tensor], clock: Clock, networks: dict[str, Network]) -> None:
    seed_step(0, clock.step, 0)
    step(batch, clock, networks)
    for network in networks.values():
        network.step(1.0)


def _rate(action: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Calls per second: the median of those made in `seconds`, at least three, after one to warm up."""
    action()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1 / sorted(times)[len(times) // 2]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    return f"CPU {names[0]}" if names else "CPU"
