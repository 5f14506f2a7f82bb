"""`tokar distill pairs`: trajectories of a teacher, resumed shard by shard, by one process or by several."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..conf.compose import Composed
from ..conf.schema import Pairs
from ..data.codes import CodeWriter
from ..data.pairs import HELD_OUT, noise_check, pair_noise
from ..data.progress import progress_bar
from ..errors import UserError
from ..evaluate.console import say
from ..models.build import weights_hash
from ..models.distill.codebook import codebook_of
from ..models.distill.flow_map import TokenMap
from ..models.distill.trajectory import check_teacher, follow
from ..models.open import OpenedGenerator, open_generator
from ..models.samplers.decode import Tally
from .strategy import Workers

BAKED_IN = ("guidance", "temperature", "top_k", "top_p")
"""What of the sampling makes the teacher's distribution, and so belongs to the pairs."""


def make_pairs(composed: Composed) -> int:
    """Write the pairs of both splits below `out`; shards that are there already are kept."""
    config: Pairs = composed.typed
    if config.sampling.greedy:
        raise UserError("a greedy teacher makes one image of all noise", where="sampling.greedy", fix="leave it at false")
    workers = Workers(config.strategy)
    workers.launch()
    place = Path(config.decode_with) if config.decode_with else None
    opened = open_generator(Path(config.model), tokenizer=place, ema=config.ema)
    check_teacher(opened.generator)
    if opened.generator.text is not None:
        raise UserError("a teacher of texts", where="model", fix="pairs are made of classes: take a generator of those")
    opened.check_guidance(config.sampling.guidance)
    codebook = codebook_of(opened.tokenizer.to(workers.device))
    opened.generator.to(workers.device)
    token_map = TokenMap(codebook, config.solver, config.solver_steps, config.fused)
    for split, first, count in (("train", 0, config.count), ("val", HELD_OUT, config.val_count)):
        _write_split(config, workers, opened, token_map, split, first, count)
    return 0


def sampling_of(config: Pairs) -> dict[str, Any]:
    """What the pairs keep of the teacher's sampling, as plain values."""
    return config.sampling.model_dump(include=set(BAKED_IN))


def _write_split(
    config: Pairs, workers: Workers, opened: OpenedGenerator, token_map: TokenMap, split: str, first: int, count: int
) -> None:
    layout = opened.tokenizer.layout.to_dict()
    facts = {
        "teacher_hash": weights_hash(opened.generator), "sampling": sampling_of(config), "seed": config.seed, "first": first,
        "solver": config.solver, "solver_steps": config.solver_steps, "noise": noise_check(config.seed, layout),
    }  # fmt: skip
    origin = config.decode_with or (opened.facts.get("tokenizer") or {}).get("path")
    classes = opened.facts.get("classes") or [str(number) for number in range(opened.generator.num_classes)]
    writer = CodeWriter(
        Path(config.out) / split, layout, weights_hash(opened.tokenizer), 1,
        {"teacher": config.model, "tokenizer": origin, "pairs": facts},
        count=count, classes=classes, shard_size=config.shard_size,
    )  # fmt: skip
    pending = writer.pending(workers.rank, workers.world)
    workers.barrier()
    made, tally, begun = sum(part.stop - part.start for part in pending), Tally(), time.perf_counter()
    with progress_bar(None, made, f"pairs of {split}") as advance:
        for part in pending:
            ids = first + np.arange(part.start, part.stop)
            labels = ids % opened.generator.num_classes
            codes = _draw(config, opened, token_map, ids, labels, tally, advance)
            writer.write(part.shard, codes[:, None], labels, [str(number) for number in ids])
    elapsed = time.perf_counter() - begun
    workers.barrier()
    if workers.rank == 0:
        sizes = [sum(entry["bytes"].values()) for entry in writer.finish()["shards"]]
        speed = f"{made / elapsed:.1f} a second on each of {workers.world} ranks, " if made else ""
        calls = f"{tally.evaluations / tally.batches:g} network evaluations each, " if tally.batches else ""
        say(f"{writer.folder}: {count} pairs, {speed}{calls}{sum(sizes) / 1e6:.1f} MB on disk")


def _draw(
    config: Pairs, opened: OpenedGenerator, token_map: TokenMap, ids: np.ndarray, labels: np.ndarray, tally: Tally,
    advance: Callable[[int], None],
) -> np.ndarray:  # fmt: skip
    """Codes `[n, N]` of the pairs of one shard; batches begin at its start, so that they are the same for any ranks."""
    layout, device, codes = opened.tokenizer.layout.to_dict(), token_map.codebook.device, []
    choices = {**sampling_of(config), "cache": config.sampling.cache, "compile": config.sampling.compile}
    for start in range(0, len(ids), config.batch_size):
        rows = slice(start, start + config.batch_size)
        noise = torch.from_numpy(pair_noise(config.seed, ids[rows], layout)).to(device)
        condition = torch.from_numpy(labels[rows]).to(device)
        found = follow(opened.generator, condition, noise, token_map, tally=tally, **choices)
        codes.append(found.cpu().numpy())
        advance(len(found))
    return np.concatenate(codes)
