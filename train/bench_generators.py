"""The speed of sampling by next-token, next-scale and block diffusion beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..conf.schema import Bench
from ..errors import UserError
from ..evaluate.stopwatch import per_second
from ..models.build import build
from ..models.generators.base import Generator
from ..models.generators.block_diffusion import BlockDiffusion
from ..models.generators.next_scale import NextScale
from ..models.generators.next_token import NextToken
from ..models.kernels import Kernel
from ..models.samplers.decode import Tally, sample
from ..models.samplers.reveal import Within
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.conv import ConvDecoder, ConvEncoder
from ..models.tokenizers.layout import TokenLayout
from ..models.tokenizers.multiscale import MultiScaleVQ
from ..models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from .bench_measure import measure
from .bench_table import Row
from .stages import fill, sizes_of
from .strategy import Workers

VAR_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BLOCK, BLOCK_STEPS = 16, (1, 2, 4, 8)


def bench_sampler(config: Bench, workers: Workers) -> Row:
    """Sampling with the KV cache and without it, the same guidance and seeds."""
    generator = generator_of(config).to(workers.device).eval()
    labels = torch.arange(config.sample_batch, device=workers.device) % config.num_classes
    sampling = config.sampling.model_dump(exclude={"cache"})
    codes: dict[bool, Tensor] = {}

    def draw(cache: bool) -> None:
        codes[cache] = sample(generator, labels, seed=0, cache=cache, **sampling)

    fast = measure(config, workers, partial(draw, True), images=config.sample_batch, tokens=generator.plan.n_tokens)
    slow = per_second(partial(draw, False), config.seconds, workers.device, workers.any)
    cached, uncached = fast["images_per_s"], slow * config.sample_batch * workers.world
    if not torch.equal(codes[True], codes[False]):
        raise UserError("cached and uncached sampling gave different tokens", where="bench sampler", fix="report this as a bug")
    return {**fast, "cached_images_per_s": cached, "uncached_images_per_s": uncached, "ratio": cached / uncached}


def bench_scales(config: Bench, workers: Workers) -> Row:
    """Next-scale sampling (the columns) beside next-token sampling of the same finest grid, both cached and of one size."""
    device, size = workers.device, _size_of(config)
    scales = _pyramid(config.grid)
    torch.manual_seed(0)
    tokenizer = _scale_tokenizer(scales)
    sizes = sizes_of(tokenizer.layout)
    known = {"num_classes": config.num_classes, "vocab_size": sizes["vocab_size"]}
    by_scale = NextScale(**known, grids=sizes["grids"], embed_dim=sizes["embed_dim"], **size).to(device).eval()
    by_scale.bind(tokenizer.to(device).eval())
    by_token = NextToken(**known, grid=config.grid, **size).to(device).eval()
    sampling = config.sampling.model_dump(exclude={"cache"})
    token_row, token_calls = _sampling(by_token, config, workers, sampling)
    scale_row, scale_calls = _sampling(by_scale, config, workers, sampling)
    token, scale = token_row["images_per_s"], scale_row["images_per_s"]
    return {
        **scale_row,
        "next_token_images_per_s": token,
        "next_scale_images_per_s": scale,
        "next_token_steps": token_calls,
        "next_scale_steps": scale_calls,
        "next_scale_tokens": by_scale.plan.n_tokens,
        "ratio": scale / token,
    }


def bench_blocks(config: Bench, workers: Workers) -> Row:
    """Block diffusion beside next-token sampling, by transformers of one size, all cached; the columns are of most steps."""
    device, size = workers.device, _size_of(config)
    known: dict[str, Any] = {"num_classes": config.num_classes, "vocab_size": layout_of(config).vocab_size, "grid": config.grid}
    by_token = _wake(NextToken(**known, **size)).to(device)
    by_block = _wake(BlockDiffusion(**known, block_size=BLOCK, **size)).to(device)
    sampling = config.sampling.model_dump(exclude={"cache", *Within.__annotations__})
    by_one, calls = _sampling(by_token, config, workers, sampling)
    token = by_one["images_per_s"]
    row: Row = {"next_token_images_per_s": token, "next_token_calls": calls}
    for steps in BLOCK_STEPS:
        found, calls = _sampling(by_block, config, workers, {**sampling, "steps": steps, "reveal": "maskgit"})
        speed = found["images_per_s"]
        row |= {
            **found,
            f"steps{steps}_images_per_s": speed,
            f"steps{steps}_calls": calls,
            f"steps{steps}_ratio": speed / token,
        }
    return row


def bench_attention(config: Bench, workers: Workers) -> Row:
    """Training passes of block diffusion over both streams by sdpa, and on a GPU by flex, which skips what the mask hides."""
    device = workers.device
    known: dict[str, Any] = {"num_classes": config.num_classes, "vocab_size": layout_of(config).vocab_size, "grid": config.grid}
    generator = BlockDiffusion(**known, block_size=BLOCK, **_size_of(config)).to(device)
    codes = torch.randint(generator.vocab_size, (config.batch_size, generator.plan.n_tokens), device=device)
    labels = torch.randint(config.num_classes, (config.batch_size,), device=device)

    def speed(kernel: Kernel) -> float:
        generator.attention = kernel
        return per_second(lambda: generator.loss(codes, labels)["loss"].backward(), config.seconds, device) * config.batch_size

    row = {"sdpa_images_per_s": speed("sdpa")}
    if device.type == "cuda":
        flex = speed("flex")
        row |= {"flex_images_per_s": flex, "ratio": flex / row["sdpa_images_per_s"]}
    return row


def _pyramid(grid: tuple[int, int]) -> list[list[int]]:
    """VAR's scales, shrunk to end with `grid`."""
    share = [side / VAR_SIDES[-1] for side in VAR_SIDES]
    pairs = [tuple(max(1, round(side * part)) for side in grid) for part in share]
    return [list(pair) for pair in dict.fromkeys(pairs)]  # small grids repeat some


def _scale_tokenizer(scales: Sequence[Sequence[int]]) -> MultiScaleVQ:
    """A multi-scale tokenizer with VAR's codes and no more of networks than a sampler asks for."""
    half: dict[str, Any] = {"width": 32, "multipliers": [1], "blocks": 1, "z_channels": 32}
    return MultiScaleVQ(ConvEncoder(**half), ConvDecoder(**half), MultiScaleQuantizer(scales=scales))


def _size_of(config: Bench) -> dict[str, Any]:
    return {key: config.generator[key] for key in ("dim", "layers", "heads") if key in config.generator}


def _sampling(generator: Generator, config: Bench, workers: Workers, sampling: dict[str, Any]) -> tuple[Row, float]:
    """A row of sampling, and calls of the network for each image."""
    labels = torch.arange(config.sample_batch, device=workers.device) % config.num_classes
    tally = Tally()

    def draw() -> None:
        sample(generator, labels, seed=0, tally=tally, **sampling)

    row = measure(config, workers, draw, images=config.sample_batch, tokens=generator.plan.n_tokens)
    return row, tally.calls_per_image


def generator_of(config: Bench) -> Generator:
    """The generator of a bench, for its grid and vocabulary; the same weights every time."""
    torch.manual_seed(0)
    return _wake(build(generator_node(config)))


def generator_node(config: Bench) -> dict[str, Any]:
    """The generator's node, whole."""
    known = {"vocab_size": layout_of(config).vocab_size, "num_classes": config.num_classes, "grid": config.grid}
    return fill(config.generator, known)


def _wake(generator: Generator) -> Generator:
    """Draw what begins at zero: such a head makes all tokens alike."""
    for parameter in generator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return generator.eval()


def layout_of(config: Bench) -> TokenLayout:
    """That of the configured tokenizer."""
    with torch.device("meta"):
        tokenizer: Tokenizer = build(config.tokenizer)
    return tokenizer.layout
