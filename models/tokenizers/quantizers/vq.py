"""Vector quantization: the nearest neighbour in a learned codebook.

Shapes: `B` batch, `D` code width, `V` codebook, `R` rows: all positions of a batch, flattened, `…` any leading dimensions.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from ...ranks import sum_over_ranks
from .base import PointwiseQuantizer, Quantized, rotated, straight_through
from .codebook import clusters, draw, kmeans, nearest_row
from .entropy import entropy_loss
from .search import nearest_code

_LAPLACE = 1e-5  # of vector-quantize-pytorch and Sonnet


class NearestQuantizer(PointwiseQuantizer):
    """Nearest neighbour among `codes()`, and the losses that follow from it.

    Losses: `codebook` = mean((q − sg z)²), `commitment` = β·mean((sg q − z)²), and only if weighted `entropy` =
    w·(mean_i H(p_i) − H(mean_i p_i)) with p = softmax(−distance/0.01), the second mean over all ranks.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        rotate: gradients reach the latent by the rotation trick, not straight through; the value is the same.
    """

    def __init__(
        self, codebook_size: int, dim: int, beta: float, l2_normalize: bool, entropy_weight: float, rotate: bool
    ) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.beta = codebook_size, dim, beta
        self.l2_normalize, self.entropy_weight, self.rotate = l2_normalize, entropy_weight, rotate

    @abstractmethod
    def codes(self) -> Tensor:
        """The code vectors `[V, D]` in float32, normalised if so configured."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[…, D]` of indices `[…]`."""
        return F.embedding(indices, self.codes())

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize vectors `[…, D]`."""
        z = self._normalize(z)
        rows = z.reshape(-1, self.dim)
        if self.training:
            self._before(rows.detach())
        codes = self.codes()
        flat = nearest_code(rows.detach(), codes.detach())
        if self.training:
            self._after(rows.detach(), flat)
        indices = flat.view(z.shape[:-1])
        q = F.embedding(indices, codes)
        latent = (rotated if self.rotate else straight_through)(q, z)
        return Quantized(latent, indices, self._losses(z, q, codes))

    def _losses(self, z: Tensor, q: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses = {"codebook": F.mse_loss(q, z.detach()), "commitment": self.beta * F.mse_loss(z, q.detach())}
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * entropy_loss(z.reshape(-1, self.dim), codes)
        return losses

    def _before(self, rows: Tensor) -> None:
        """In training, before the codes are used: rows `[R, D]`."""

    def _after(self, rows: Tensor, used: Tensor) -> None:
        """In training, when the codes `[R]` of rows `[R, D]` are known."""

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_normalize else rows


class VectorQuantizer(NearestQuantizer):
    """A codebook learned by gradient (VQ-VAE; l2-normalised as in ViT-VQGAN), with the losses of `NearestQuantizer`.

    All that moves the codebook without a gradient sees the vectors of all ranks, follows torch's RNG and keeps its counts
    in a buffer, so that ranks stay equal and a resumed run repeats it. The codebook must not be sharded.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        restart_after: a code that no training step has used for so many steps is moved onto a vector of the current
            batch; 0: never.
        kmeans_batches: in the first so many training steps the codebook becomes the k-means of the batch (ten iterations,
            each batch from where the last one ended); 0: never. It reads one number back from the device per step.
        rotate: gradients reach the latent by the rotation trick, not straight through; the value is the same.
    """

    codebook: Tensor
    steps_unused: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 16384,
        dim: PositiveInt = 8,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = True,
        entropy_weight: NonNegativeFloat = 0.0,
        restart_after: NonNegativeInt = 0,
        kmeans_batches: NonNegativeInt = 0,
        rotate: bool = False,
    ) -> None:
        super().__init__(codebook_size, dim, beta, l2_normalize, entropy_weight, rotate)
        self.restart_after, self.kmeans_batches = restart_after, kmeans_batches
        start = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self._hold(self._normalize(start))
        # Below zero: so many batches of k-means are still to come. It has the same keys with and without k-means.
        self.register_buffer("steps_unused", torch.full((codebook_size,), -kmeans_batches, dtype=torch.int64))

    def codes(self) -> Tensor:
        """The codebook `[V, D]` in float32, normalised if so configured."""
        return self._normalize(self.codebook.float())

    def _hold(self, start: Tensor) -> None:
        self.codebook = nn.Parameter(start)

    @torch.no_grad()
    def _before(self, rows: Tensor) -> None:
        # Before the codebook is used: changing it after would break the backward pass.
        if self.kmeans_batches:
            starting, left = self.steps_unused < 0, -self.steps_unused.amin()
            self._move(starting, kmeans(rows, self.codebook.float(), left, self.kmeans_batches, self.l2_normalize))
            self.steps_unused.add_(starting)
        if self.restart_after:
            dead = self.steps_unused >= self.restart_after
            vectors = draw(rows, self.codebook_size)
            self._move(dead & vectors.isfinite().all(-1), vectors)
            self.steps_unused.masked_fill_(dead, 0)

    def _move(self, which: Tensor, vectors: Tensor) -> None:
        """Set the codes that `which [V]` marks to their `vectors [V, D]`."""
        self.codebook.copy_(torch.where(which[:, None], vectors.to(self.codebook), self.codebook))

    @torch.no_grad()
    def _after(self, rows: Tensor, used: Tensor) -> None:
        if self.restart_after:
            hits = sum_over_ranks(torch.zeros_like(self.steps_unused).index_fill_(0, used, 1))
            waiting = torch.where(hits > 0, 0, self.steps_unused + 1)
            self.steps_unused.copy_(torch.where(self.steps_unused < 0, self.steps_unused, waiting))


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook that follows the vectors it quantizes as a moving average (VQ-VAE, appendix A.1); a buffer, without gradient.

    n ← γn + (1−γ)·count, m ← γm + (1−γ)·sum, e = m / n′, with n′ = (n + ε)/(Σn + Vε)·Σn (Laplace smoothing), over the
    vectors of all ranks, after each training step has used the codebook. A step with a vector that is not finite is left out.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss; there is no codebook loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        restart_after: as in `VectorQuantizer`; a restarted code counts as one that has one vector.
        kmeans_batches: as in `VectorQuantizer`.
        rotate: gradients reach the latent by the rotation trick, not straight through; the value is the same.
        decay: γ.
    """

    cluster_size: Tensor
    cluster_sum: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 16384,
        dim: PositiveInt = 8,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = True,
        entropy_weight: NonNegativeFloat = 0.0,
        restart_after: NonNegativeInt = 0,
        kmeans_batches: NonNegativeInt = 0,
        rotate: bool = False,
        decay: Fraction = 0.99,
    ) -> None:
        super().__init__(codebook_size, dim, beta, l2_normalize, entropy_weight, restart_after, kmeans_batches, rotate)
        self.decay = decay
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("cluster_sum", self.codebook.clone())

    def codes(self) -> Tensor:
        """The codebook `[V, D]` in float32, normalised if so configured; a copy, as the update comes before the backward."""
        return super().codes().clone()

    def _hold(self, start: Tensor) -> None:
        self.register_buffer("codebook", start)

    def _losses(self, z: Tensor, q: Tensor, codes: Tensor) -> dict[str, Tensor]:
        return {name: loss for name, loss in super()._losses(z, q, codes).items() if name != "codebook"}

    def _move(self, which: Tensor, vectors: Tensor) -> None:
        super()._move(which, vectors)
        self.cluster_size.masked_fill_(which, 1.0)
        self.cluster_sum.copy_(torch.where(which[:, None], vectors, self.cluster_sum))

    @torch.no_grad()
    def _after(self, rows: Tensor, used: Tensor) -> None:
        super()._after(rows, used)
        counts, sums = clusters(rows, used, self.codebook_size)
        finite = sums.isfinite().all()
        self.cluster_size.copy_(torch.where(finite, torch.lerp(counts, self.cluster_size, self.decay), self.cluster_size))
        self.cluster_sum.copy_(torch.where(finite, torch.lerp(sums, self.cluster_sum, self.decay), self.cluster_sum))
        total = self.cluster_size.sum()
        size = (self.cluster_size + _LAPLACE) / (total + self.codebook_size * _LAPLACE) * total
        self.codebook.copy_(self._normalize(self.cluster_sum / size[:, None]))


class ClusteringVectorQuantizer(VectorQuantizer):
    """A codebook learned by gradient, whose idle codes are drawn to the vectors nearest to them (CVQ, Zheng & Vedaldi 2023).

    p ← γp + (1−γ)·frequency, α = exp(−10·V·p/(1−γ) − 1e-3), e ← (1−α)·e + α·(nearest vector of any rank), after each training
    step has used the codebook; p starts at 0, so the first step places every code. As TiTok (BL, SL) and TA-TiTok do.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        rotate: gradients reach the latent by the rotation trick, not straight through; the value is the same.
        decay: γ, below 1.

    Raises:
        ValueError: the decay is 1.
    """

    frequency: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 8192,
        dim: PositiveInt = 64,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = False,
        entropy_weight: NonNegativeFloat = 0.0,
        rotate: bool = False,
        decay: Fraction = 0.99,
    ) -> None:
        super().__init__(codebook_size, dim, beta, l2_normalize, entropy_weight, rotate=rotate)
        if decay == 1:
            raise ValueError("a decay of 1 never learns how often a code is used; choose one below 1, e.g. 0.99")
        self.decay = decay
        self.register_buffer("frequency", torch.zeros(codebook_size))

    def codes(self) -> Tensor:
        """The codebook `[V, D]` in float32, normalised if so configured; a copy, as the update comes before the backward."""
        return super().codes().clone()

    @torch.no_grad()
    def _after(self, rows: Tensor, used: Tensor) -> None:
        counts, _ = clusters(rows, used, self.codebook_size)
        self.frequency.copy_(torch.lerp(counts / counts.sum(), self.frequency, self.decay))
        alpha = torch.exp(-10 * self.codebook_size / (1 - self.decay) * self.frequency - 1e-3)[:, None]
        nearest = nearest_row(rows, self.codes())
        self.codebook.copy_(torch.where(nearest.isfinite(), torch.lerp(self.codebook.float(), nearest, alpha), self.codebook))
