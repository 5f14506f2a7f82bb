"""What was made fast, beside the plain way to do the same: rows of `tokar bench` whose two sides take turns.

Shapes: `B` batch, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..conf.schema import Bench
from ..conf.spine import Ema as EmaConfig
from ..data.stream import to_image
from ..evaluate.stopwatch import in_turns
from ..models.build import build
from ..models.samplers.decode import sample
from ..models.samplers.pick import restrict
from .bench_generators import generator_of, layout_of
from .bench_table import Row
from .network import Trainable
from .strategy import Workers
from .units import compile_units

DECAY = EmaConfig().decay
TOP_K, TOP_P = 900, 0.95
"""VAR's."""


def race(fast: Callable[[], object], plain: Callable[[], object], seconds: float, device: torch.device) -> Row:
    """`fast_ms` and `plain_ms`, medians of calls that take turns, and `ratio`: how many times as fast the first is."""
    times = in_turns({"fast": fast, "plain": plain}, 3, device, seconds=2 * seconds)
    return {**{f"{name}_ms": 1000 * time for name, time in times.items()}, "ratio": times["plain"] / times["fast"]}


def bench_update(config: Bench, workers: Workers) -> Row:
    """A step of the optimizer and of the average of the weights: fused, beside parameter by parameter."""
    network = workers.wrap({"generator": Trainable(generator_of(config), config.generator, config.optim)}, EmaConfig())[
        "generator"
    ]
    module = copy.deepcopy(network.module)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=config.optim.lr, foreach=False, fused=False)
    for weight in [*network.module.parameters(), *weights]:
        weight.grad = torch.full_like(weight, 1e-3)

    def fast() -> None:
        network.optimizer.step()
        assert network.ema is not None
        network.ema.update(10**6)

    @torch.no_grad()
    def plain() -> None:
        optimizer.step()
        for average, weight in zip(averages, weights, strict=True):
            average.mul_(DECAY).add_(weight, alpha=1 - DECAY)

    return race(fast, plain, config.seconds, workers.device)


def bench_convolutions(config: Bench, workers: Workers) -> Row:
    """A training pass of the tokenizer's network: convolutions over channels that lie together, beside planes."""
    size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
    images = to_image(torch.randint(0, 256, size, dtype=torch.uint8)).to(workers.device)
    plain = build(config.tokenizer).to(workers.device)
    fast = copy.deepcopy(plain).to(memory_format=torch.channels_last)

    def passing(module: nn.Module, pixels: Tensor) -> Callable[[], None]:
        return lambda: module(pixels).reconstruction.square().mean().backward()

    lying = images.contiguous(memory_format=torch.channels_last)
    return race(passing(fast, lying), passing(plain, images.contiguous()), config.seconds, workers.device)


def bench_guidance(config: Bench, workers: Workers) -> Row:
    """Guided sampling, both halves in one batch, beside two batches; `unguided_ratio`: what is saved where guidance is off."""
    generator = generator_of(config).to(workers.device).eval()
    labels = torch.arange(config.sample_batch, device=workers.device) % config.num_classes
    options = config.sampling.model_dump(exclude={"guidance"})

    def draw(guidance: float) -> Callable[[], Tensor]:
        return lambda: sample(generator, labels, seed=0, guidance=guidance, **options)

    guided, unguided = draw(2.0), draw(1.0)
    row = race(guided, lambda: (unguided(), unguided()), config.seconds, workers.device)
    return {**row, "unguided_ratio": 2 * row["fast_ms"] / row["plain_ms"]}


def bench_truncation(config: Bench, workers: Workers) -> Row:
    """Top-k and top-p of one step's logits in one pass, beside one after the other."""
    logits = 2 * torch.randn(config.sample_batch, 1, layout_of(config).vocab_size, device=workers.device)
    top_k = min(TOP_K, logits.shape[-1] // 2)
    return race(
        lambda: restrict(logits, top_k, TOP_P), lambda: restrict_plainly(logits, top_k, TOP_P), config.seconds, workers.device
    )


def restrict_plainly(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """What `pick.restrict` makes of logits `[..., V]`, by a pass for each and a sort of all that goes there and back."""
    kept = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    ordered, order = kept.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    dropped = probability.cumsum(dim=-1) - probability > top_p
    dropped[..., 0] = False
    return kept.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def bench_compiled(config: Bench, workers: Workers) -> Row:
    """A training pass of the generator with its blocks compiled, beside eager ones."""
    plain = generator_of(config).to(workers.device)
    fast = copy.deepcopy(plain)
    compile_units(fast)
    codes = torch.randint(plain.vocab_size, (config.batch_size, plain.plan.n_tokens), device=workers.device)
    labels = torch.randint(config.num_classes, (config.batch_size,), device=workers.device)

    def passing(generator: nn.Module) -> Callable[[], None]:
        return lambda: generator(codes, labels)["loss"].backward()

    return race(passing(fast), passing(plain), config.seconds, workers.device)


PLAIN: Mapping[str, Callable[[Bench, Workers], Row]] = {
    "update": bench_update,
    "convolutions": bench_convolutions,
    "guidance": bench_guidance,
    "truncation": bench_truncation,
}
