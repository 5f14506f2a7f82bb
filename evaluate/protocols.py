"""A protocol at work: its feature network, the empty measures of its samples, and those of its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.protocols import Protocol
from ..conf.schema import Evaluate, Measured
from ..data.files import os_errors
from ..data.progress import progress_bar
from ..data.remote import cache_folder
from ..errors import UserError
from ..models.build import locate_model
from ..models.samplers.decode import Tally
from .feature_net import FeatureNet, Features
from .features import ClassifierFeatures, features_place, load_features
from .frechet import Gaussian, load_gaussians
from .generation import Reference, score_of
from .images import content_hash, count_samples, has_images, read_samples
from .measures import Batch, Frechet, InceptionScore, Mean, Measure, SpatialFrechet, class_accuracy, clip_score
from .neighbours import KernelDistance, PrecisionRecall
from .protocol import content_id
from .ranks import Pace
from .reference import Images
from .score import SampleScore

UNNAMED = "features"
COMPARING = ("frechet", "spatial_frechet", "precision_recall", "kid")
"""Measures that need a reference."""
COSTS = tuple(Tally().per_image)
"""What batches of drawn samples tell beside their images."""


def choose_protocol(config: Evaluate, of: str) -> Protocol:
    """The protocol that was asked for, with `count` in its place; without a name, the Fréchet distance of some features.

    Args:
        config: of the evaluation.
        of: `tokenizer` or `samples`.

    Raises:
        UserError: it is of something else, or reads other features.
    """
    asked, named = config.features.name, config.protocol
    if named is None:
        return by_features(config, of, config.count)
    if of not in named.of:
        what = f"is of {' or '.join(f'a {kind}' if kind == 'tokenizer' else kind for kind in named.of)}"
        other = "rfid-val" if of == "tokenizer" else "gfid-50k"
        raise UserError(what, where=f"protocol={named.name}", fix=f"take another one, such as protocol={other}")
    if asked not in (None, named.features):
        raise UserError(f"protocol {named.name} reads {named.features}", where="features.name", fix="leave it out")
    return named.model_copy(update={"count": config.count}) if config.count else named


def by_features(config: Measured, of: str, count: int | None) -> Protocol:
    """The protocol without a name: a Fréchet distance in the configured features, and class accuracy where classes are told."""
    features = config.features.name or "classifier"
    judged = of == "samples" and (features == "classifier" or config.judge is not None)
    measures = ["frechet", *(["class_accuracy"] if judged else [])]
    plain = {"name": UNNAMED, "of": [of], "features": features, "measures": measures, "count": count}
    return Protocol.model_validate(plain)


@dataclass(frozen=True)
class Judging:
    """A protocol with the networks that it needs.

    Args:
        protocol: see there.
        network: makes the features.
        judge: classifier of the class accuracy; `None`: `network`.
        captions: for the CLIP score.
    """

    protocol: Protocol
    network: FeatureNet
    judge: ClassifierFeatures | None = None
    captions: Sequence[str] | None = None

    def score(self, count: int) -> SampleScore:
        """Empty measures of `count` samples."""
        measures: dict[str, Measure] = {name: self._measure(name, count, self.protocol.keep) for name in self.protocol.measures}
        return SampleScore(self.network, measures | {name: Mean(name, _told(name), {}) for name in COSTS})

    def reference_score(self, count: int, given: Mapping[str, Gaussian]) -> SampleScore:
        """Empty measures of `count` real images that samples are compared with, beside those that are given."""
        kept = self.protocol.keep_reference
        compared = [name for name in self.protocol.measures if name in COMPARING and name not in given]
        return SampleScore(self.network, {name: self._measure(name, count, kept) for name in compared})

    def sides(self, count: int) -> tuple[SampleScore, SampleScore]:
        """Empty measures of reconstructions and of their originals."""
        return self.score(count), self.reference_score(count, {})

    def _measure(self, name: str, count: int, keep: int) -> Measure:
        protocol, kept = self.protocol, (count, keep, self.protocol.seed, next(self.network.parameters()).device)
        match name:
            case "frechet":
                return Frechet(self.network)
            case "spatial_frechet":
                return SpatialFrechet(self.network)
            case "inception_score":
                return InceptionScore(protocol.split_size)
            case "precision_recall":
                return PrecisionRecall(protocol.neighbours, *kept)
            case "kid":
                return KernelDistance(protocol.subsets, protocol.subset_size, *kept)
            case "clip_score":
                return clip_score(self.network, self.captions)
        return class_accuracy(self.network, self.judge)

    def name(self) -> dict[str, Any]:
        """What the result says of the protocol beside its parts; nothing of one without a name."""
        if self.protocol.name == UNNAMED:
            return {}
        changes = self.protocol.changes()
        return {"name": self.protocol.name, **({"changed": changes} if changes else {})}


def _told(name: str) -> Callable[[Features, Batch], Tensor | None]:
    return lambda features, batch: batch.get(name)


def open_judging(protocol: Protocol, config: Measured, device: torch.device, captions: Sequence[str] | None = None) -> Judging:
    """Load the networks of a protocol.

    Raises:
        UserError: weights that are missing or do not fit.
    """
    features, judge = config.features, None
    place = features_place(protocol.features, features.path or (config.judge if protocol.features == "classifier" else None))
    network = load_features(protocol.features, place, device, sha256=features.sha256)
    if config.judge:
        judge = ClassifierFeatures(locate_model(Path(config.judge))).to(device)
    return Judging(protocol, network, judge, captions)


def read_captions(path: Path) -> list[str]:
    """Captions of images in order, one on each line.

    Raises:
        UserError: no readable file.
    """
    with os_errors(path):
        return path.read_text().splitlines()


def reference_of(judging: Judging, place: Path | None, images: Callable[[], Images], pace: Pace) -> Reference:
    """The real images of a protocol: looked at once, then found in the cache by the hash of their content.

    Args:
        judging: the protocol.
        place: `.npz` of statistics or images, or a folder of images; `None`: `images`.
        images: gives the source, number and names of real images.
        pace: batch size.

    Raises:
        UserError: there is no such thing, or it lacks what a measure needs.
    """
    if not set(judging.protocol.measures) & set(COMPARING):
        return Reference()
    given = load_gaussians(place) if place and place.is_file() else {}
    given = {name: gaussian for name, gaussian in given.items() if name in judging.protocol.measures}
    fixed = {name: (SpatialFrechet if name == "spatial_frechet" else Frechet)(judging.network, given[name]) for name in given}
    source, count, facts = _file_images(judging, place, given) if place else images()
    score = judging.reference_score(count, given)
    score.check(count)
    if score.measures:
        identity = {"facts": facts, **score.protocol()}
        folder = cache_folder() / "references" / content_id(identity, digits=16)
        with progress_bar(None, count, "reference") as advance:
            pace = replace(pace, folder=folder, on_batch=advance)
            score = score_of(lambda: judging.reference_score(count, given), source, count, pace)
    if given:
        facts["statistics"] = sorted(given)
    return Reference(SampleScore(judging.network, {**fixed, **score.measures}), facts)


def _file_images(judging: Judging, place: Path, given: Mapping[str, Gaussian]) -> Images:
    facts = {"sha256": content_hash(place)}
    missing = [name for name in judging.protocol.measures if name in COMPARING and name not in given]
    if given and not missing:
        return lambda batches: iter(()), 0, facts
    if given and not has_images(place):
        fix = "give one that holds images too, or images alone"
        raise UserError(f"has statistics but no images for {', '.join(missing)}", where=place, fix=fix)
    count = count_samples(place)
    return lambda batches: read_samples(place, batches), count, {**facts, "images": count}
