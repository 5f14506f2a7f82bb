"""Samples of a generator, of what was distilled from one, or on disk, under a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..conf.protocols import Protocol
from ..data.files import digest_of
from ..data.progress import progress_bar
from ..errors import UserError
from ..models.build import weights_hash
from ..models.open import OpenedGenerator, open_distilled
from ..models.samplers.decode import Tally
from ..models.tokenizers.base import Tokenizer
from .distilled import ask_of, draw_vectors
from .frechet import save_gaussians
from .generation import evaluate_samples, score_of
from .images import content_hash, count_samples, read_samples
from .protocol import Result
from .protocols import choose_protocol, read_captions
from .ranks import Source, this_rank
from .reference import captions_of
from .samples import Draw, Texts, class_ids, draw_codes, drawn
from .speed import Speed
from .task import Evaluation


def stored_images(at: Evaluation) -> Result:
    """Images of an `.npz` or a folder."""
    protocol = choose_protocol(at.config, "samples")
    count = at.count(protocol, count_samples(at.target))
    subject = {"images": str(at.target), "sha256": content_hash(at.target)}
    return judged(at, protocol, lambda batches: read_samples(at.target, batches), count, subject)


def generator_samples(at: Evaluation, subject: dict[str, Any]) -> Result:
    """Samples that a generator draws; `subject` names it."""
    protocol, opened = choose_protocol(at.config, "samples"), at.opened_generator()
    sampling = at.sampling_of(opened)
    count = at.count(protocol, None)
    conditions = _conditions(at, opened, count)
    if opened.generator.text is not None:
        subject["prompts"] = f"captions of {at.reference_split}"

    def draw(numbers: np.ndarray, tally: Tally) -> Iterator[dict[str, Tensor]]:
        mine = conditions.only(numbers) if isinstance(conditions, Texts) else conditions[torch.from_numpy(numbers)]
        return draw_codes(
            opened.generator, mine, seed=at.config.seed, sampling=sampling, batch_size=len(numbers), numbers=numbers,
            tally=tally,
        )  # fmt: skip

    about = {**subject, "tokenizer": weights_hash(opened.tokenizer)[:16], "seed": at.config.seed, "sampling": sampling}
    return _measured(at, protocol, opened.tokenizer, draw, count, about)


def _conditions(at: Evaluation, opened: OpenedGenerator, count: int) -> Tensor | Texts:
    """Classes in turn, or the captions of the reference."""
    if opened.generator.text is None:
        return class_ids(count, None, opened.generator.num_classes)
    return at.texts(opened, at.reference_split, count)


def distilled_samples(at: Evaluation, subject: dict[str, Any]) -> Result:
    """Samples of what was distilled from a generator; `subject` names it."""
    protocol, place = choose_protocol(at.config, "samples"), Path(at.config.decode_with) if at.config.decode_with else None
    opened = open_distilled(at.target, tokenizer=place, ema=at.config.ema)
    opened.model.to(at.device)
    opened.tokenizer.to(at.device)
    student, sampling = at.config.student, at.as_sampled
    ask = ask_of(student, opened, sampling, seed=at.config.seed, tokenizer=place)
    asked = student.model_dump() | ({"sampling": sampling.model_dump()} if ask.teacher else {})
    count = at.count(protocol, None)
    labels = class_ids(count, None, opened.model.num_classes)

    def draw(numbers: np.ndarray, tally: Tally) -> Iterator[dict[str, Tensor]]:
        return draw_vectors(
            opened, labels[torch.from_numpy(numbers)], ask, seed=at.config.seed, batch_size=len(numbers), numbers=numbers,
            tally=tally,
        )  # fmt: skip

    about = {**subject, "tokenizer": weights_hash(opened.tokenizer)[:16], "seed": at.config.seed, "student": asked}
    return _measured(at, protocol, opened.tokenizer, draw, count, about)


def _measured(
    at: Evaluation, protocol: Protocol, tokenizer: Tokenizer, draw: Draw, count: int, subject: Mapping[str, Any]
) -> Result:
    """Samples as they are drawn, and how fast that went."""
    speed = Speed(at.device, at.config.batch_size)
    result = judged(at, protocol, drawn(tokenizer, draw, speed), count, subject)
    return replace(result, speed=speed.told())


def judged(at: Evaluation, protocol: Protocol, source: Source, count: int, subject: Mapping[str, Any]) -> Result:
    """Samples under a protocol, against the reference that it needs.

    Args:
        at: see there.
        protocol: see there.
        source: of the samples.
        count: how many.
        subject: what made them.
    """
    config = at.config
    judging = at.judging(protocol, _captions(at, protocol, count))
    empty = judging.score(count)  # what does not fit, or is too little, is told before anything is drawn
    empty.check(count)
    reference = at.reference(judging, Path(config.reference) if config.reference else None)
    subject = {**subject, "count": count}
    with progress_bar(None, count, "samples") as advance:
        pace = at.pace({**subject, **empty.protocol(), "captions": digest_of(judging.captions)}, advance)
        score = score_of(lambda: judging.score(count), source, count, pace)
    result = evaluate_samples(score, count, reference, subject)
    if config.statistics and this_rank()[0] == 0:
        save_gaussians(score.gaussians, Path(config.statistics))
    return replace(result, protocol={**judging.name(), **result.protocol})


def _captions(at: Evaluation, protocol: Protocol, count: int) -> list[str] | None:
    if "clip_score" not in protocol.measures:
        return None
    if at.config.captions:
        return read_captions(Path(at.config.captions))
    try:
        return captions_of(at.data, at.reference_split, count)
    except UserError as error:
        fix = "give captions=FILE with one on each line, or data that has them"
        raise UserError(f"the CLIP score needs captions: {error.what}", where=error.where, fix=fix) from error
