"""Pairs of settings that cannot work together, each told with the nearest that does, before a device is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .duration import Duration


def conflicts(config: Any) -> Iterator[str]:
    """Pairs of settings that cannot work together, each with the nearest that does."""
    if getattr(config, "losses", None) is not None:
        yield from _lpips_conflicts(config.losses)
    if hasattr(config, "discriminator"):
        yield from _loss_conflicts(config.losses, config.discriminator)
    codes = getattr(config, "codes", None)
    if codes is not None and not codes.path and not codes.tokenizer:
        yield "codes.tokenizer: missing; give a tokenizer run (codes.tokenizer=runs/…) or code shards (codes.path=…)"
    loop, strategy = getattr(config, "loop", None), getattr(config, "strategy", None)
    if loop is not None and strategy is not None:
        yield from _batch_conflicts(loop, strategy)
    if strategy is not None:
        yield from _strategy_conflicts(strategy)
    if strategy is not None and getattr(config, "head_only", False) and strategy.name in ("fsdp", "zero3"):
        yield f"head_only: {strategy.name} shards no weights that stay as they are; set strategy=ddp, zero1 or zero2"
    if getattr(config, "contrast", None) and getattr(config, "adapt", None):
        yield "adapt: another fine-tuning than contrast; adapt first, then run contrast on the adapted generator"
    if getattr(config, "score_weight", None) == 0 and not config.pair_weight:
        yield "pair_weight: and score_weight are 0, so nothing is learnt; give one of them a weight"
    profile = getattr(config, "profile", None)
    if not isinstance(profile, bool | None) and profile.every is not None and profile.every < profile.steps:
        yield f"profile.every: a window of {profile.steps} steps is not over by then; raise it to {profile.steps} or more"


def _lpips_conflicts(losses: Any) -> Iterator[str]:
    if losses.perceptual_weight > 0 and not losses.lpips_weights:
        yield "losses.lpips_weights: missing; LPIPS needs a weights file, give its path or set losses.perceptual_weight=0"
    if losses.lpips_weights and not Path(losses.lpips_weights).is_file():
        yield f"losses.lpips_weights: no file {losses.lpips_weights}; give the path of VGG16 and linear-head weights"


def _loss_conflicts(losses: Any, discriminator: Any) -> Iterator[str]:
    if losses.convnext_weight > 0 and not losses.convnext_path:
        yield "losses.convnext_path: missing; give a folder or hub id of a ConvNeXt, or set losses.convnext_weight=0"
    for key in ("adaptive", "r1_weight", "lecam_weight"):
        if getattr(losses, key) and discriminator is None:
            off = "false" if key == "adaptive" else "0"
            yield f"losses.{key}: there is no discriminator; set losses.{key}={off} or discriminator=patchgan"
    if losses.adaptive and Duration.parse(losses.auxiliary_end).value > 0:
        yield "losses.adaptive: cannot tell the shortcut from the reconstruction; set losses.auxiliary_end=0 or adaptive=false"


def _batch_conflicts(loop: Any, strategy: Any) -> Iterator[str]:
    parts = strategy.devices * strategy.nodes * loop.accumulate
    if loop.batch_size < parts:
        yield (f"loop.batch_size: {loop.batch_size} samples cannot fill {parts} micro-batches "
               f"(devices × nodes × accumulate); raise it to {parts} or lower loop.accumulate")  # fmt: skip


def _strategy_conflicts(strategy: Any) -> Iterator[str]:
    name, cpu = strategy.name, strategy.accelerator == "cpu"
    ranks, sharded, zero = strategy.devices * strategy.nodes, name not in ("single", "ddp"), name.startswith("zero")
    if name == "single" and ranks > 1:
        yield f"strategy.name: single uses one device, not {ranks}; set strategy=ddp"
    if strategy.precision == "fp16" and cpu:
        yield "strategy.precision: fp16 needs a GPU; set strategy.precision=bf16 or fp32"
    if strategy.precision == "fp8" and cpu:
        yield "strategy.precision: fp8 needs a GPU of compute capability 8.9 or more; set strategy.precision=bf16"
    if sharded and strategy.channels_last:
        yield f"strategy.channels_last: flat shards of {name} have no memory format; set it to false, or strategy=ddp"
    if strategy.offload != "none" and name not in ("zero2", "zero3"):
        yield f"strategy.offload: {name} cannot; set strategy=zero2 or zero3, or strategy.offload=none"
    elif strategy.offload != "none" and cpu:
        yield "strategy.offload: moves from a GPU to the host, and there is none; set strategy.offload=none"
    if strategy.backend == "nccl" and cpu:
        yield "strategy.backend: nccl joins GPUs only; set strategy.backend=auto"
    if strategy.attention == "flash" and strategy.precision == "fp32":
        yield "strategy.attention: flash computes in half precision; set strategy.precision=bf16, or attention=auto"
    if zero and strategy.compile and strategy.recompute == "selective":
        yield "strategy.recompute: selective does not see ZeRO's gathering in compiled units; set strategy.recompute=full"
