"""What is made of features, image after image: each measure is a small running state that merges with others of its kind.

Shapes: `B` batch, `D` feature width, `K` classes, `P` parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .feature_net import FeatureNet, Features
from .frechet import Gaussian, GaussianStatistics, check_spread, frechet_distance
from .frozen_features import ClipFeatures

Batch = Mapping[str, Tensor]
"""`image` uint8 `[B, H, W, 3]` and `index` `[B]`, the images' numbers in their set; perhaps `label` `[B]`."""


class Measure(ABC):
    """A running state over images; `merge` of its `state_dict` continues it, here or in another process."""

    compares: ClassVar[bool] = False
    """It needs the same measure of a reference."""

    @abstractmethod
    def update(self, features: Features, batch: Batch) -> None:
        """Add a batch."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that was added, as plain values and tensors on the CPU."""

    @abstractmethod
    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another one of the same kind has seen."""

    @abstractmethod
    def compute(self, reference: Self | None) -> dict[str, float]:
        """The numbers by name.

        Args:
            reference: of a measure that compares, the real images.
        """

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """How it is taken, and with which choices."""

    def check(self, count: int) -> None:  # noqa: B027 - most measures take any number
        """Make sure that so many images are enough, before any is looked at.

        Raises:
            UserError: they are too few.
        """

    @property
    def wanted(self) -> np.ndarray | None:
        """Which images of the set it looks at, one bool for each; `None`: all."""
        return None


class Frechet(Measure):
    """Fréchet distance of pooled features; the state is one mean and one scatter matrix, however many images come.

    Args:
        network: makes the features.
        given: statistics from a file, in place of images.
    """

    compares = True

    def __init__(self, network: FeatureNet, given: Gaussian | None = None) -> None:
        dim, device = self.width(network), next(network.parameters()).device
        if given is not None and len(given.mean) != dim:
            raise UserError(
                f"statistics of {len(given.mean)} features, {self.key(network)} has {dim}", where=given.origin,
                fix="give statistics of the same feature network",
            )  # fmt: skip
        self.name, self.given = self.key(network), given
        self.statistics = GaussianStatistics(dim, device)

    def width(self, network: FeatureNet) -> int:
        """`D`."""
        return network.dim

    def key(self, network: FeatureNet) -> str:
        """What the number is called."""
        return network.distance

    def select(self, features: Features) -> Tensor | None:
        """Which features, `[B, D]`."""
        return features.pooled

    def update(self, features: Features, batch: Batch) -> None:
        """See `Measure.update`."""
        chosen = self.select(features)
        assert chosen is not None
        self.statistics.update(chosen)

    def state_dict(self) -> dict[str, Any]:
        """See `Measure.state_dict`."""
        return self.statistics.state_dict()

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `Measure.merge`."""
        self.statistics.merge(state)

    def check(self, count: int) -> None:
        """See `Measure.check`."""
        check_spread(count)

    def gaussian(self) -> Gaussian:
        """Mean and covariance of what was added, or those given."""
        return self.given or self.statistics.gaussian()

    def compute(self, reference: Frechet | None) -> dict[str, float]:  # type: ignore[override]
        """See `Measure.compute`."""
        assert reference is not None
        return {self.name: frechet_distance(self.gaussian(), reference.gaussian())}

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return {"features": "pooled", "covariance": "over n - 1, float64"}


class SpatialFrechet(Frechet):
    """The same of features that keep their place (sFID: Nash et al., 2021)."""

    def width(self, network: FeatureNet) -> int:
        """See `Frechet.width`.

        Raises:
            UserError: the network gives no spatial features.
        """
        if not network.spatial_dim:
            raise UserError(
                f"the {network.name} features have no places", where="protocol.measures", fix="take inception_tf1 for sFID"
            )
        return network.spatial_dim

    def key(self, network: FeatureNet) -> str:
        """See `Frechet.key`."""
        return "sfid"

    def select(self, features: Features) -> Tensor | None:
        """See `Frechet.select`."""
        return features.spatial

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return {"features": "first 7 channels of mixed_6/conv, 17x17", "covariance": "over n - 1, float64"}


class InceptionScore(Measure):
    r"""$\exp E_x KL(p(y|x) \| p(y))$ of each part of the images in order, and their mean (Salimans et al., 2016).

    The state holds, for each part, $\sum p$ and $\sum p \log p$.

    Args:
        split_size: images of each part; the last may be smaller.
    """

    def __init__(self, split_size: int) -> None:
        self.split_size = split_size
        self.parts: dict[int, tuple[int, Tensor, float]] = {}

    def update(self, features: Features, batch: Batch) -> None:
        """See `Measure.update`.

        Raises:
            UserError: the network has no classes.
        """
        logits = logits_of(features).double()
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum(1).cpu()
        for part, rows in _rows_by_part(batch["index"] // self.split_size):
            self._add(part, len(rows), p[rows.to(p.device)].sum(0).cpu(), negative_entropy[rows].sum().item())

    def _add(self, part: int, count: int, p: Tensor, negative_entropy: float) -> None:
        mine = self.parts.get(part, (0, torch.zeros_like(p), 0.0))
        self.parts[part] = (mine[0] + count, mine[1] + p, mine[2] + negative_entropy)

    def state_dict(self) -> dict[str, Any]:
        """See `Measure.state_dict`."""
        return {"parts": [[part, *values] for part, values in sorted(self.parts.items())]}

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `Measure.merge`."""
        for part, *values in state["parts"]:
            self._add(part, *values)

    def compute(self, reference: InceptionScore | None = None) -> dict[str, float]:  # type: ignore[override]
        """See `Measure.compute`; also the spread over the parts, where there are several."""
        scores = []
        for _, (count, total, negative_entropy) in sorted(self.parts.items()):
            mean = total / count
            scores.append(float(np.exp(negative_entropy / count - torch.special.xlogy(mean, mean).sum().item())))
        spread = {"inception_score_std": float(np.std(scores))} if len(scores) > 1 else {}
        return {"inception_score": float(np.mean(scores)), **spread}

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return {"parts": f"{self.split_size} images each, in order", "logits": "without bias", "spread": "over n"}


def _rows_by_part(parts: Tensor) -> list[tuple[int, Tensor]]:
    return [(int(part), (parts == part).nonzero()[:, 0]) for part in parts.unique()]


class Mean(Measure):
    """The mean of one number for each image.

    Args:
        name: of the number.
        values: gives them for a batch, `[B]`; `None`: the batch tells no such number.
        about: how it is taken.
    """

    def __init__(self, name: str, values: Callable[[Features, Batch], Tensor | None], about: Mapping[str, Any]) -> None:
        self.name, self.values, self.about = name, values, dict(about)
        self.count, self.total = 0, 0.0

    def update(self, features: Features, batch: Batch) -> None:
        """See `Measure.update`."""
        values = self.values(features, batch)
        if values is not None:
            self.count += len(values)
            self.total += values.double().sum().item()

    def state_dict(self) -> dict[str, Any]:
        """See `Measure.state_dict`."""
        return {"count": self.count, "total": self.total}

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `Measure.merge`."""
        self.count += int(state["count"])
        self.total += float(state["total"])

    def compute(self, reference: Mean | None = None) -> dict[str, float]:  # type: ignore[override]
        """See `Measure.compute`; nothing where no batch told the number."""
        return {self.name: self.total / self.count} if self.count else {}

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return self.about


def class_accuracy(network: FeatureNet, judge: FeatureNet | None = None) -> Mean:
    """Share of images that a classifier puts into the class that they were asked to be.

    Args:
        network: makes the features.
        judge: the classifier; `None`: `network` itself.
    """

    def right(features: Features, batch: Batch) -> Tensor | None:
        if "label" not in batch:
            return None
        labels = batch["label"]
        logits = logits_of(features if judge is None else judge(batch["image"])).cpu()
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"label {int(labels.max())} for a classifier of {logits.shape[1]} classes", fix="train one on this data"
            )
        return logits.argmax(1) == labels.cpu()

    return Mean("class_accuracy", right, {"classifier": (judge or network).protocol()})


def clip_score(network: FeatureNet, captions: Sequence[str] | None) -> Mean:
    """100 times the cosine of an image and its caption, not below 0 (Hessel et al., 2021, without their factor of 2.5).

    Args:
        network: CLIP.
        captions: of the images in order, from the beginning again where there are fewer.

    Raises:
        UserError: another network, or no captions.
    """
    if not isinstance(network, ClipFeatures):
        raise UserError(f"{network.name} reads no captions", where="protocol.features", fix="take clip for the CLIP score")
    if not captions:
        raise UserError("the CLIP score needs captions", where="captions", fix="give a file with one on each line")

    def cosine(features: Features, batch: Batch) -> Tensor:
        texts = network.captions([captions[int(i) % len(captions)] for i in batch["index"]])
        return 100 * torch.cosine_similarity(features.pooled, texts).clamp(min=0)

    return Mean("clip_score", cosine, {"score": "100 * max(cosine, 0)", "captions": "image i has caption i, in turn"})


def logits_of(features: Features) -> Tensor:
    """Logits `[B, K]`.

    Raises:
        UserError: the network has no classes.
    """
    if features.logits is None:
        raise UserError("these features have no classes", fix="take a classifier or inception")
    return features.logits
