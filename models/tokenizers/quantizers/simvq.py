"""SimVQ (Zhu et al. 2024): a frozen codebook seen through one learned matrix.

Shapes: `D` code width, `V` codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....ranges import NonNegativeFloat, PositiveInt
from .vq import NearestQuantizer


class SimVQ(NearestQuantizer):
    """Nearest neighbour among E·Wᵀ, where E is frozen Gaussian noise and W is learned: every step moves every code.

    Losses as in `NearestQuantizer`.

    Args:
        codebook_size: number of codes `V`.
        dim: width of a code `D`.
        beta: weight of the commitment loss.
        l2_normalize: compare and return unit vectors.
        entropy_weight: weight of the entropy loss; at 0 it is not computed.
        rotate: gradients reach the latent by the rotation trick, not straight through; the value is the same.
    """

    codebook: Tensor

    def __init__(
        self,
        codebook_size: PositiveInt = 16384,
        dim: PositiveInt = 8,
        beta: NonNegativeFloat = 0.25,
        l2_normalize: bool = False,
        entropy_weight: NonNegativeFloat = 0.0,
        rotate: bool = False,
    ) -> None:
        super().__init__(codebook_size, dim, beta, l2_normalize, entropy_weight, rotate)
        self.register_buffer("codebook", torch.randn(codebook_size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)

    def codes(self) -> Tensor:
        """The transformed codebook `[V, D]` in float32, normalised if so configured."""
        return self._normalize(F.linear(self.codebook.float(), self.transform.weight.float()))
