"""Quantizers of signs: lookup-free (Yu et al. 2023; Open-MAGVIT2) and binary spherical (Zhao et al. 2024).

Shapes: `D` bits, one a channel, `R` rows: all positions of a batch, flattened, `…` any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from .base import PointwiseQuantizer, Quantized, straight_through
from .entropy import TEMPERATURE, score_entropy_loss


class LFQ(PointwiseQuantizer):
    """Each channel becomes its sign: +1 above 0, else -1. No codebook; channel 0 is the lowest bit of the index.

    Losses: `commitment` = β·mean((z − sg q)²), and only if weighted `entropy` = w·(mean_i H(p_i) − γ·H(mean_i p_i)) with
    p = softmax(2·z·c/temperature) over all codes c, the second mean over all ranks. In p the bits are independent, so H(p_i) is
    exactly the sum over groups of bits; H of the mean is summed likewise, which is exact when one group holds all bits and an
    upper bound otherwise: it does not see dependence between groups. 2^18 codes in groups of 9 cost two times 512 scores a row.

    Args:
        bits: number of channels; there are 2^bits codes.
        beta: weight of the commitment loss.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        diversity: γ.
        group_bits: bits in a group of the entropy loss.
        temperature: of the entropy loss.
    """

    def __init__(
        self,
        bits: PositiveInt = 18,
        beta: NonNegativeFloat = 0.25,
        entropy_weight: NonNegativeFloat = 0.1,
        diversity: NonNegativeFloat = 1.0,
        group_bits: PositiveInt = 9,
        temperature: PositiveFloat = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.dim, self.codebook_size, self.unit = bits, 2**bits, 1.0
        self.beta, self.entropy_weight, self.diversity = beta, entropy_weight, diversity
        self.group_bits, self.temperature = group_bits, temperature

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[…, D]` of indices `[…]`."""
        return signs(indices, self.dim) * self.unit

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize vectors `[…, D]`."""
        positive = z > 0
        indices = (positive.long() << torch.arange(self.dim, device=z.device)).sum(-1)
        q = torch.where(positive, self.unit, -self.unit)
        losses = {"commitment": self.beta * F.mse_loss(z, q)}
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(z.reshape(-1, self.dim))
        return Quantized(straight_through(q, z), indices, losses)

    def _entropy(self, rows: Tensor) -> Tensor:
        groups = []
        for part in rows.split(self.group_bits, dim=-1):
            codes = signs(torch.arange(2 ** part.shape[1], device=rows.device), part.shape[1])
            groups.append(score_entropy_loss(part, 2 * self.unit / self.temperature * codes, diversity=self.diversity))
        return torch.stack(groups).sum()


class BSQ(LFQ):
    """Binary spherical quantization: the vector is normalised, and each channel becomes ±1/√bits. Losses as in `LFQ`.

    Args:
        bits: number of channels; there are 2^bits codes.
        beta: weight of the commitment loss.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        diversity: γ.
        group_bits: bits in a group of the entropy loss.
        temperature: of the entropy loss.
    """

    def __init__(
        self,
        bits: PositiveInt = 18,
        beta: NonNegativeFloat = 0.25,
        entropy_weight: NonNegativeFloat = 0.1,
        diversity: NonNegativeFloat = 1.0,
        group_bits: PositiveInt = 9,
        temperature: PositiveFloat = TEMPERATURE,
    ) -> None:
        super().__init__(bits, beta, entropy_weight, diversity, group_bits, temperature)
        self.unit = bits**-0.5

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize vectors `[…, D]`."""
        return super().quantize(F.normalize(z, dim=-1))


def signs(indices: Tensor, bits: int) -> Tensor:
    """±1 `[…, bits]` for the bits of indices `[…]`, the lowest first, +1 where set; float32."""
    return (indices[..., None] >> torch.arange(bits, device=indices.device) & 1).float() * 2 - 1
