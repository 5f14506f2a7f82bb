"""Index backpropagation quantization (Shi et al. 2024).

Shapes: `D` code width, `V` codebook, `R` rows: all positions of a batch, flattened, `…` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from .base import PointwiseQuantizer, Quantized
from .entropy import TEMPERATURE, in_chunks, score_entropy_loss
from .search import CHUNK, best_code


class IBQ(PointwiseQuantizer):
    """The code with the largest inner product, with a gradient to all codes through the soft assignment.

    With p = softmax(z·Eᵀ) and h the one-hot of its largest, the latent is (h − sg p + p)·E: its value is the chosen code.
    Losses: `index` = mean((latent − z)²), `commitment` = mean((sg(h·E) − z)²), `codebook` = β·mean((h·E − sg z)²), and only if
    weighted `entropy` = w·(mean_i H(p_i) − γ·H(mean_i p_i)) of the assignment at a lower temperature, the second mean over
    all ranks. The assignment is made in pieces and recomputed in the backward pass: no `[R, V]` is ever held.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the codebook loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        diversity: γ.
        temperature: of the entropy loss.
    """

    def __init__(
        self,
        codebook_size: PositiveInt = 16384,
        dim: PositiveInt = 256,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = False,
        entropy_weight: NonNegativeFloat = 0.05,
        diversity: NonNegativeFloat = 1.0,
        temperature: PositiveFloat = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.beta, self.l2_normalize = codebook_size, dim, beta, l2_normalize
        self.entropy_weight, self.diversity, self.temperature = entropy_weight, diversity, temperature
        # N(0, 1), as the authors': codes near 0 would all score alike, and the soft assignment would tell none from another.
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim))

    def codes(self) -> Tensor:
        """The codebook `[V, D]` in float32, normalised if so configured."""
        return self._normalize(self.codebook.float())

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[…, D]` of indices `[…]`."""
        return F.embedding(indices, self.codes())

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize vectors `[…, D]`."""
        z = self._normalize(z)
        rows, codes = z.reshape(-1, self.dim), self.codes()
        indices = best_code(rows.detach(), codes.detach(), codes.new_zeros(self.codebook_size)).view(z.shape[:-1])
        hard = F.embedding(indices, codes)
        soft = _soft_codes(rows, codes).view_as(z)
        latent = hard + (soft - soft.detach())
        losses = {
            "index": F.mse_loss(latent, z),
            "commitment": F.mse_loss(z, hard.detach()),
            "codebook": self.beta * F.mse_loss(hard, z.detach()),
        }
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * score_entropy_loss(
                rows, codes / self.temperature, diversity=self.diversity
            )
        return Quantized(latent, indices, losses)

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_normalize else rows


def _soft_codes(rows: Tensor, codes: Tensor) -> Tensor:
    """softmax(rows·codesᵀ)·sg(codes) `[R, D]`: gradients pass through the assignment alone."""

    def mixed(part: Tensor) -> Tensor:
        return (part @ codes.t()).softmax(-1) @ codes.detach()

    return torch.cat(in_chunks(mixed, rows, max(1, CHUNK // codes.shape[0])))
