"""The measures of a set of images, side by side on the features of one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .feature_net import FeatureNet
from .frechet import Gaussian
from .measures import Batch, Frechet, Measure


class SampleScore:
    """Running measures of images.

    Args:
        network: makes the features, once for all measures.
        measures: by name.
    """

    def __init__(self, network: FeatureNet, measures: Mapping[str, Measure]) -> None:
        self.network, self.measures = network, dict(measures)

    def check(self, count: int) -> None:
        """Make sure that so many images are enough for every measure.

        Raises:
            UserError: they are too few.
        """
        for measure in self.measures.values():
            measure.check(count)

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        if not self.measures:
            return
        features = self.network(batch["image"])
        for measure in self.measures.values():
            measure.update(features, batch)

    def state_dict(self) -> dict[str, Any]:
        """See `ranks.Score`."""
        return {name: measure.state_dict() for name, measure in self.measures.items()}

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `ranks.Score`."""
        for name, measure in self.measures.items():
            measure.merge(state[name])

    def numbers(self, reference: SampleScore | None) -> dict[str, float]:
        """The numbers of all measures."""
        numbers: dict[str, float] = {}
        for name, measure in self.measures.items():
            numbers |= measure.compute(reference.measures[name] if measure.compares and reference else None)
        return numbers

    @property
    def wanted(self) -> np.ndarray | None:
        """Images that some measure looks at; `None`: all."""
        masks = [measure.wanted for measure in self.measures.values()]
        chosen = [mask for mask in masks if mask is not None]
        return np.logical_or.reduce(chosen) if len(chosen) == len(masks) else None

    @property
    def gaussians(self) -> dict[str, Gaussian]:
        """The statistics of its Fréchet distances, by measure."""
        return {name: measure.gaussian() for name, measure in self.measures.items() if isinstance(measure, Frechet)}

    def protocol(self) -> dict[str, Any]:
        """The features, and how each measure is taken."""
        about = {name: said for name, measure in self.measures.items() if (said := measure.protocol())}
        return {"features": self.network.protocol(), "measures": about}
