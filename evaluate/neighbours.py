"""Measures of sets of features: precision and recall by nearest neighbours, and the kernel distance (KID).

They keep features, so the number kept is bounded: images whose numbers are the first of a fixed permutation.
Shapes: `N` samples, `M` real images, `D` feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.randoms import permutation
from ..errors import UserError
from .feature_net import Features
from .measures import Batch, Measure

ROWS = 1024
"""Distances are made for so many rows at once."""


class KeptFeatures(Measure):
    """Pooled features of at most `limit` images of a set.

    Args:
        count: images of the set.
        limit: the largest number kept; of more, those whose numbers come first in `permutation(seed, 0, count)`.
        seed: of that choice.
        device: where distances are made.
    """

    compares = True

    def __init__(self, count: int, limit: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.count, self.limit, self.seed, self.device = count, limit, seed, device
        self._chosen = np.zeros(count, bool)
        self._chosen[permutation(seed, 0, count)[:limit]] = True
        self._rows: list[tuple[Tensor, Tensor]] = []

    @property
    def wanted(self) -> np.ndarray | None:
        """See `Measure.wanted`."""
        return self._chosen

    def update(self, features: Features, batch: Batch) -> None:
        """See `Measure.update`."""
        mine = torch.from_numpy(self._chosen[batch["index"].numpy()])
        if mine.any():
            self._rows.append((batch["index"][mine], features.pooled.cpu()[mine]))

    def state_dict(self) -> dict[str, Any]:
        """See `Measure.state_dict`."""
        if not self._rows:
            return {}
        self._rows = [(torch.cat([index for index, _ in self._rows]), torch.cat([rows for _, rows in self._rows]))]
        return {"index": self._rows[0][0], "features": self._rows[0][1]}

    def merge(self, state: Mapping[str, Any]) -> None:
        """See `Measure.merge`."""
        if state:
            self._rows.append((state["index"], state["features"]))

    @property
    def features(self) -> Tensor:
        """What was kept in the order of the images' numbers, float64 `[N, D]`."""
        state = self.state_dict()
        if not state:
            raise UserError("no images to measure", fix="give a set that has some")
        return state["features"][state["index"].argsort()].to(self.device, torch.float64)

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        if self.count <= self.limit:
            return {"kept": self.count}
        return {"kept": self.limit, "choice": f"first of permutation(seed {self.seed}) of {self.count}"}


class PrecisionRecall(KeptFeatures):
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision is the share of samples within the radius of some real image, recall the share of real images within that of
    some sample; the radius of an image reaches to its k-th neighbour in its own set, itself not counted.

    Args:
        neighbours: k.
        *kept, **more: see `KeptFeatures`.
    """

    def __init__(self, neighbours: int, *kept: Any, **more: Any) -> None:
        super().__init__(*kept, **more)
        self.neighbours = neighbours

    def compute(self, reference: Self | None) -> dict[str, float]:
        """See `Measure.compute`.

        Raises:
            UserError: a set with no more images than neighbours.
        """
        assert reference is not None
        samples, real = self.features, reference.features
        return {
            "precision": covered(samples, real, radii(real, self.neighbours)),
            "recall": covered(real, samples, radii(samples, self.neighbours)),
        }

    def check(self, count: int) -> None:
        """See `Measure.check`."""
        check_neighbours(min(count, self.limit), self.neighbours)

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return {"neighbours": self.neighbours, "distance": "Euclidean, float64", **super().protocol()}


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`[N, M]` of `[N, D]` and `[M, D]`."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def check_neighbours(count: int, neighbours: int) -> None:
    """Make sure that each of so many images has so many others.

    Raises:
        UserError: there are too few.
    """
    if count <= neighbours:
        raise UserError(f"{count} images have no {neighbours} neighbours each", where="count", fix="take more images")


def radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance `[N]` of each to its k-th neighbour among the others.

    Raises:
        UserError: there are not so many.
    """
    count, found = len(features), []
    check_neighbours(count, neighbours)
    for start in range(0, count, ROWS):
        block = squared_distances(features[start : start + ROWS], features)
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        found.append(block.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)


def covered(points: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Share of `points` `[N, D]` within the squared `radius` `[M]` of some of `centres` `[M, D]`."""
    inside = [(squared_distances(part, centres) <= radius).any(1) for part in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


class KernelDistance(KeptFeatures):
    r"""Kernel Inception distance: unbiased $MMD^2$ with $(x \cdot y / D + 1)^3$, mean over subsets (Bińkowski et al., 2018).

    Args:
        subsets: how many.
        subset_size: images of each side in one, drawn without replacement.
        *kept, **more: see `KeptFeatures`.
    """

    def __init__(self, subsets: int, subset_size: int, *kept: Any, **more: Any) -> None:
        super().__init__(*kept, **more)
        self.subsets, self.subset_size = subsets, subset_size

    def compute(self, reference: Self | None) -> dict[str, float]:
        """See `Measure.compute`; also the spread over the subsets.

        Raises:
            UserError: a set smaller than a subset.
        """
        assert reference is not None
        samples, real = self.features, reference.features
        self.check(min(len(samples), len(real)))
        values = []
        for number in range(self.subsets):
            rows, columns = (
                permutation(self.seed, 2 * number + side, len(part))[: self.subset_size]
                for side, part in ((1, samples), (2, real))
            )
            values.append(squared_mmd(samples[torch.from_numpy(rows)], real[torch.from_numpy(columns)]))
        return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}

    def check(self, count: int) -> None:
        """See `Measure.check`."""
        if (kept := min(count, self.limit)) < self.subset_size:
            fix = "take more images, or a smaller protocol.subset_size"
            raise UserError(f"subsets of {self.subset_size} of {kept} images", where="kid", fix=fix)

    def protocol(self) -> dict[str, Any]:
        """See `Measure.protocol`."""
        return {
            "subsets": f"{self.subsets} of {self.subset_size}, by permutation(seed {self.seed})",
            "kernel": "(x y / D + 1)^3, unbiased, float64", **super().protocol(),
        }  # fmt: skip


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of `[N, D]` and `[N, D]` under the cubic kernel."""
    n, width = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())
