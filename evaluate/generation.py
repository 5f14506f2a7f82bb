"""How close generated images come to real ones: Fréchet distance to a reference, and whether a classifier sees the asked class.

Shapes: `B` batch. Images are uint8 `[B, H, W, 3]`, labels int64 `[B]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UserError
from .features import ClassifierFeatures, FeatureNet, Features
from .frechet import Gaussian, GaussianStatistics, frechet_distance
from .protocol import Result
from .ranks import merge_ranks


def gaussian_of(
    batches: Iterable[Mapping[str, Tensor]],
    network: FeatureNet,
    *,
    data: Mapping[str, Any] | None = None,
    across_ranks: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Gaussian:
    """Feature statistics of a set of images, e.g. the reference, streamed.

    Args:
        batches: mappings with `image` uint8 `[B, H, W, 3]`.
        network: makes the features.
        data: names the images (dataset, split, crop, content hash); goes into the statistics' protocol.
        across_ranks: see `evaluate_generation`.
        on_batch: told the number of images after each batch.
    """
    score = GenerationScore(network)
    for batch in batches:
        score.update(batch["image"])
        if on_batch:
            on_batch(len(batch["image"]))
    score = merge_ranks(score) if across_ranks else score
    return score.statistics.gaussian({"features": network.protocol(), "data": dict(data or {})})


class GenerationScore:
    """Running feature statistics of samples, and how many of them the classifier puts into their class.

    Args:
        network: makes the features of the Fréchet distance.
        judge: its classes are compared with the labels; may be `network` itself.
    """

    def __init__(self, network: FeatureNet, judge: ClassifierFeatures | None = None) -> None:
        self.network, self.judge = network, judge
        self.statistics = GaussianStatistics(network.dim, next(network.parameters()).device)
        self.judged = self.correct = 0

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return self.statistics.count

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Add samples and, for class accuracy, the classes they were asked to be."""
        features = self.network(images)
        self.statistics.update(features.pooled)
        if self.judge is None or labels is None:
            return
        logits = _logits(features if self.judge is self.network else self.judge(images))
        if labels.numel() and int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"label {int(labels.max())} for a classifier of {logits.shape[1]} classes", fix="train one on this data"
            )
        self.judged += len(labels)
        self.correct += int((logits.argmax(1).cpu() == labels.cpu()).sum())

    def empty(self) -> Self:
        """A fresh score of the same kind."""
        return type(self)(self.network, self.judge)

    def merge(self, other: Self) -> None:
        """Add another part of the same set."""
        self.statistics.merge(other.statistics)
        self.judged += other.judged
        self.correct += other.correct

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {"statistics": self.statistics.state_dict(), "judged": self.judged, "correct": self.correct}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.statistics.load_state_dict(state["statistics"])
        self.judged, self.correct = int(state["judged"]), int(state["correct"])

    def numbers(self, reference: Gaussian | None) -> dict[str, float]:
        """The metrics by name."""
        numbers = {}
        if reference is not None:
            numbers[f"fd_{self.network.name}"] = frechet_distance(
                self.statistics.gaussian({"features": self.network.protocol()}), reference
            )
        if self.judged:
            numbers["class_accuracy"] = self.correct / self.judged
        return numbers


def _logits(features: Features) -> Tensor:
    if features.logits is None:
        raise UserError("these features have no classes", fix="judge class accuracy with the classifier")
    return features.logits


@torch.no_grad()
def evaluate_generation(
    samples: Iterable[Mapping[str, Tensor]],
    reference: Gaussian | None,
    network: FeatureNet,
    *,
    judge: ClassifierFeatures | None = None,
    subject: Mapping[str, Any] | None = None,
    across_ranks: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Result:
    """Measure a stream of samples.

    Args:
        samples: mappings with `image` uint8 `[B, H, W, 3]` and, for class accuracy, `label` int64 `[B]`.
        reference: statistics of real images (`gaussian_of`, `Gaussian.load`), or `None` for class accuracy alone.
        network: makes the features.
        judge: classifier for class accuracy; `None` leaves it out.
        subject: what made the samples: run, checkpoint, guidance, seeds.
        across_ranks: every rank of the process group calls this with its part of the samples, and gets the whole result.
        on_batch: told the number of images after each batch.

    Raises:
        UserError: no samples, a reference of other features, or labels beyond the classes.
    """
    score = GenerationScore(network, judge)
    for batch in samples:
        score.update(batch["image"], batch.get("label"))
        if on_batch:
            on_batch(len(batch["image"]))
    score = merge_ranks(score) if across_ranks else score
    numbers = score.numbers(reference)
    if not numbers:
        raise UserError("nothing to measure", fix="give a reference, or labelled samples and a classifier")
    return Result("generation", numbers, _protocol(score, reference), dict(subject or {}))


def _protocol(score: GenerationScore, reference: Gaussian | None) -> dict[str, Any]:
    protocol: dict[str, Any] = {"count": score.count, "samples": "uint8, as stored"}
    if reference is not None:
        protocol["features"] = score.network.protocol()
        described = {key: value for key, value in reference.protocol.items() if key != "features"}
        protocol["reference"] = {**described, "count": reference.count or "not stated"}
    if score.judged and score.judge:
        protocol["classifier"] = score.judge.protocol()
    return protocol
