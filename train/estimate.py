"""`tokar estimate`: whether a training fits on a machine, and how long a step takes, without a GPU, data or weights.

The networks are built without values. Their step on the CPU's kernels says FLOPs and activations (`cost.py`), formulas say
what the strategy holds and sends (`footprint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..conf.compose import Composed, compose, groups, unchecked
from ..conf.schema import Estimate
from ..conf.spine import Strategy
from ..conf.stages import ClassifierRun, GeneratorRun
from ..errors import UserError, nearest
from ..models.build import build
from ..models.tokenizers.base import Tokenizer
from .classifier import ClassifierStage
from .cost import Cost, modules_of, step_cost
from .footprint import Footprint, fixed_bytes, footprint, size_of
from .generator import GeneratorStage
from .peaks import DEVICES, Device, known
from .stage import Stage
from .stages import check_image_size, fill, sizes_of
from .tokenizer import TokenizerStage

GIB = 2**30
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def estimate(stage: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of a table: what the config holds on each device, whether it fits, and the time of a step.

    Raises:
        UserError: the config is wrong, the device is unknown, or the step looks at values (FlexVAR's tokenizer).
    """
    own = [text for text in overrides if text.partition("=")[0] in Estimate.model_fields]
    machine: Estimate = compose("estimate", own).typed
    device = _device(machine)
    composed = compose(stage, [text for text in overrides if text not in own])
    config, strategy = composed.typed, composed.typed.strategy
    ranks = strategy.devices * strategy.nodes
    built, batch = build_on_paper(composed, machine)
    count = -(-config.loop.batch_size // (ranks * config.loop.accumulate))
    shapes = {name: ((count, *shape), dtype) for name, (shape, dtype) in batch.items()}
    sizes = [size_of(item, averages=config.ema is not None) for item in built.trainables.values()]
    plain = _cost(built, strategy, shapes, again=False)
    held = _cost(built, strategy, shapes, again=True) if strategy.recompute != "none" else plain
    paper = footprint(strategy, ranks, sizes, fixed_bytes(modules_of(built)), held, config.loop.accumulate)
    rows = _memory_rows(paper, device.gib * machine.fill)
    work = (plain.flops + plain.frozen_flops) * config.loop.accumulate
    done = (held.flops + held.frozen_flops) * config.loop.accumulate
    computing = done / (1e12 * (device.single if strategy.precision == "fp32" else device.half) * machine.mfu)
    speed = min(device.link, machine.network_gbs) if strategy.nodes > 1 else device.link
    sending = paper.sent / (1e9 * speed)
    longest = computing + sending
    return [
        ("", ""),
        (f"{stage} on {ranks} x {machine.device}", f"{strategy.name} {strategy.precision}, recompute {strategy.recompute}"),
        ("trained parameters", f"{sum(size.trained for size in sizes):,}"),
        ("samples a micro-batch and device", f"{count} ({config.loop.batch_size} a step)"),
        *rows,
        (
            "model FLOPs a step and device",
            f"{work / 1e12:.2f} T, of them frozen networks {plain.frozen_flops * config.loop.accumulate / 1e12:.2f} T",
        ),
        ("with what is computed again", f"{done / 1e12:.2f} T"),
        ("computing", f"{1000 * computing:.0f} ms at MFU {machine.mfu:g}, stated"),
        ("sending", f"{paper.sent / GIB:.2f} GiB a device, {1000 * sending:.0f} ms at {speed:g} GB/s, stated"),
        ("step", f"{1000 * max(computing, sending):.0f} ms (all sending hidden) to {1000 * longest:.0f} ms (none)"),
        ("images/s", f"{config.loop.batch_size / longest:.0f} to {config.loop.batch_size / max(computing, sending):.0f}"),
    ][1:]


def _cost(stage: Stage, strategy: Strategy, shapes: Shapes, *, again: bool) -> Cost:
    try:
        return step_cost(stage, strategy, shapes, again=again)
    except RuntimeError as error:
        raise UserError(
            "a step of this stage looks at values, so it cannot be told without them",
            where="tokar estimate",
            fix="measure it: tokar train with profile.steps=3 profile.memory=true",
        ) from error


def _memory_rows(paper: Footprint, room: float) -> list[tuple[str, str]]:
    rows = [(f"  {what}", f"{size / GIB:8.2f} GiB") for what, size in paper.held.items()]
    total = paper.total / GIB
    verdict = "fits" if total <= room else "does not fit"
    return [*rows, ("memory of a device", f"{total:8.2f} GiB of {room:.1f}: {verdict}")]


def _device(machine: Estimate) -> Device:
    row = known(machine.device)
    if row is None and None in (machine.memory_gib, machine.tflops, machine.link_gbs):
        raise UserError(
            "no such GPU in the table",
            where=f"device={machine.device}",
            fix=f"{nearest(machine.device, DEVICES)}; or give memory_gib, tflops and link_gbs",
        )
    base = row or Device(0, 0, 0, 0, "stated")
    peaks = (machine.tflops or base.half, machine.tflops or base.single)
    return Device(*peaks, machine.memory_gib or base.gib, machine.link_gbs or base.link, base.source)


def build_on_paper(composed: Composed, machine: Estimate) -> tuple[Stage, Shapes]:
    """The stage of a config without values, and what one sample of a batch looks like.

    Raises:
        UserError: it is not known whose codes a generator learns.
    """
    config = composed.typed
    side = config.data.image_size
    image: Shapes = {"image": ((side, side, 3), torch.uint8)}
    sample: Shapes = dict.fromkeys(("label", "index", "epoch"), ((), torch.int64))
    with torch.device("meta"):
        if isinstance(config, GeneratorRun):
            return _generator(config, machine, sample, image)
        if isinstance(config, ClassifierRun):
            known_sizes = {"image_size": side, "num_classes": machine.num_classes}
            return ClassifierStage(config, fill(config.classifier, known_sizes), {}), sample | image
        stage = TokenizerStage(config)
        check_image_size(side, stage.tokenizer.layout)
        return stage, sample | image


def _generator(config: GeneratorRun, machine: Estimate, sample: Shapes, image: Shapes) -> tuple[Stage, Shapes]:
    tokenizer = _tokenizer(config, machine)
    layout = tokenizer.layout
    node = fill(config.generator, {"num_classes": machine.num_classes, **sizes_of(layout)})
    stage = GeneratorStage(config, node, tokenizer, {})
    if config.codes.path is None:
        return stage, sample | image
    return stage, sample | {"codes": ((layout.total_tokens,), torch.int64)}


def _tokenizer(config: GeneratorRun, machine: Estimate) -> Tokenizer:
    name = machine.codes_of or (Path(config.codes.tokenizer).name if config.codes.tokenizer else "")
    known_names = groups()["experiment"]
    if name not in known_names:
        raise UserError(
            f"no experiment {name!r} of a tokenizer" if name else "it is not known whose codes this generator learns",
            where="codes_of",
            fix="name the tokenizer's experiment, e.g. codes_of=llamagen_vq16",
        )
    plain: dict[str, Any] = unchecked("tokenizer", [f"experiment={name}"])[0]
    tokenizer: Tokenizer = build(plain["tokenizer"])
    return tokenizer
