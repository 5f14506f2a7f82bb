"""Gaussian statistics of features, streamed and mergeable, and the Fréchet distance between two of them.

Shapes: `B` batch, `D` feature width. Everything is float64: single precision loses the distance to cancellation.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .protocol import write_whole


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features.

    Args:
        mean: `[D]` float64.
        covariance: `[D, D]` float64, normalised by count - 1.
        origin: the file that they were read from.
    """

    mean: Tensor
    covariance: Tensor
    origin: Path | None = None


NAMES = {"frechet": ("mu", "sigma"), "spatial_frechet": ("mu_s", "sigma_s")}
"""Arrays of mean and covariance in the reference files of the usual ImageNet evaluator, by measure."""


def save_gaussians(gaussians: Mapping[str, Gaussian], path: Path) -> Path:
    """Write statistics by measure as `.npz` in the layout of the usual ImageNet evaluator (see `NAMES`)."""
    arrays: dict[str, NDArray[Any]] = {}
    for measure, gaussian in gaussians.items():
        for name, value in zip(NAMES[measure], (gaussian.mean, gaussian.covariance), strict=True):
            arrays[name] = value.cpu().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())
    return path


def load_gaussians(path: Path) -> dict[str, Gaussian]:
    """The statistics that an `.npz` holds, by measure; other arrays are not read.

    Raises:
        UserError: unreadable, or the arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                measure: _fitting(arrays[names[0]], arrays[names[1]], path)
                for measure, names in NAMES.items()
                if set(names) <= set(arrays)
            }
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError("no readable statistics", where=path, fix="give an .npz with the arrays mu and sigma") from error


def _fitting(mean: NDArray[Any], covariance: NDArray[Any], path: Path) -> Gaussian:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        what = f"mean {mean.shape} and covariance {covariance.shape} do not fit"
        raise UserError(what, where=path, fix="make the file again")
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), path)


class GaussianStatistics:
    """Running mean and scatter by the pairwise update of Chan, Golub & LeVeque (1979), in which parts merge like batches.

    Args:
        dim: feature width `D`.
        device: where the float64 state lives.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features `[B, D]`.

        Raises:
            UserError: a feature is not finite.
        """
        batch = features.detach().to(self.mean)
        if not len(batch):
            return
        if not torch.isfinite(batch).all():
            raise UserError("a feature is not finite", fix="check the samples and the weights of the feature network")
        mean = batch.mean(0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the `state_dict` of another part of the same set."""
        self._add(int(state["count"]), state["mean"].to(self.mean), state["scatter"].to(self.mean))

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of what was added.

        Raises:
            UserError: fewer than two images.
        """
        check_spread(self.count)
        return Gaussian(self.mean.clone(), self.scatter / (self.count - 1))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or to merge elsewhere."""
        return {"count": self.count, "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}


def check_spread(count: int) -> None:
    """Make sure that so many images have a covariance.

    Raises:
        UserError: fewer than two.
    """
    if count < 2:
        raise UserError(f"statistics of {count} images have no covariance", fix="give at least two images")


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    r"""Squared 2-Wasserstein distance of two Gaussians, $|m_1-m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})$.

    The trace of the root is the nuclear norm of $S_1^{1/2} S_2^{1/2}$. Singular values of that product are exact to rounding,
    where eigenvalues of $S_1 S_2$ lose half the digits, so rank-deficient covariances need no added diagonal.
    Follows Dowson & Landau (1982) and Heusel et al. (2017), eq. 6.

    Raises:
        UserError: the widths differ.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features are {len(first.mean)} and {len(second.mean)} wide", fix="use the same feature network on both sides"
        )
    shift = (first.mean - second.mean.to(first.mean)).square().sum()
    spread = first.covariance.trace() + second.covariance.trace().to(shift)
    values_a, vectors_a = _spectrum(first.covariance)
    values_b, vectors_b = _spectrum(second.covariance.to(first.covariance))
    product = values_a.sqrt()[:, None] * (vectors_a.T @ vectors_b) * values_b.sqrt()
    overlap = torch.linalg.svdvals(product).sum() if product.numel() else torch.zeros_like(shift)
    return max(0.0, (shift + spread - 2 * overlap).item())


def _spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs above the rounding error of the decomposition; the rest is noise that a square root would blow up."""
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return values[keep], vectors[:, keep]
