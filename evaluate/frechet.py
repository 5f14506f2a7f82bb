"""Gaussian statistics of features, streamed and mergeable, and the Fréchet distance between two of them.

Shapes: `B` batch, `D` feature width. Everything is float64: single precision loses the distance to cancellation.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .protocol import content_id, file_hash, write_whole


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features, with the protocol of their making.

    Args:
        mean: `[D]` float64.
        covariance: `[D, D]` float64, normalised by count - 1.
        count: number of images; 0 when a file does not say.
        protocol: of the features and the data; empty when a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write `.npz` with `mu`, `sigma` (the names of the common reference files), `count` and `protocol` (JSON text)."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            mu=self.mean.cpu().numpy(),
            sigma=self.covariance.cpu().numpy(),
            count=np.int64(self.count),
            protocol=np.str_(json.dumps(dict(self.protocol), sort_keys=True)),
        )
        write_whole(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """Read `.npz` with `mu` and `sigma`; published reference files have no more.

        Raises:
            UserError: unreadable, or the arrays do not fit each other.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, covariance = torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double()
                count = int(arrays["count"]) if "count" in arrays else 0
                protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {"sha256": file_hash(path)}
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise UserError("no readable statistics", where=path, fix="give an .npz with the arrays mu and sigma") from error
        if covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit", where=path, fix="make the file again"
            )
        return cls(mean, covariance, count, protocol)


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

    def merge(self, other: GaussianStatistics) -> None:
        """Add the statistics of another part of the same set."""
        self._add(other.count, other.mean.to(self.mean), other.scatter.to(self.mean))

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not count:
            return
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def gaussian(self, protocol: Mapping[str, Any] | None = None) -> Gaussian:
        """Mean and unbiased covariance of what was added.

        Raises:
            UserError: fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"statistics of {self.count} images have no covariance", fix="give at least two images")
        return Gaussian(self.mean.clone(), self.scatter / (self.count - 1), self.count, dict(protocol or {}))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or to merge elsewhere."""
        return {"count": self.count, "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.count = int(state["count"])
        self.mean.copy_(state["mean"])
        self.scatter.copy_(state["scatter"])


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    r"""Squared 2-Wasserstein distance of two Gaussians, $|m_1-m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})$.

    The trace of the root is the nuclear norm of $S_1^{1/2} S_2^{1/2}$. Singular values of that product are exact to rounding,
    where eigenvalues of $S_1 S_2$ lose half the digits, so rank-deficient covariances need no added diagonal.
    Follows Dowson & Landau (1982) and Heusel et al. (2017), eq. 6.

    Raises:
        UserError: the widths differ or the features were made differently.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features are {len(first.mean)} and {len(second.mean)} wide", fix="use the same feature network on both sides"
        )
    _same_features(first, second)
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


def _same_features(first: Gaussian, second: Gaussian) -> None:
    mine, theirs = first.protocol.get("features"), second.protocol.get("features")
    if mine and theirs and mine != theirs:
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        raise UserError(f"statistics of different features ({', '.join(keys)} differ)", fix="compute the reference again")


def cached_gaussian(folder: Path, identity: Mapping[str, Any], compute: Callable[[], Gaussian]) -> Gaussian:
    """Statistics from `folder`, computed and written there the first time.

    Args:
        folder: the cache.
        identity: all that decides the numbers (content hash of the data, protocol of the features, crop, count): its hash
            is the file's name, so a changed data set or network is never answered from an old file.
        compute: makes the statistics.
    """
    path = folder / f"gaussian-{content_id(identity, digits=16)}.npz"
    if path.exists():
        return Gaussian.load(path)
    gaussian = compute()
    gaussian.save(path)
    return gaussian
