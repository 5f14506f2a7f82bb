"""What a feature network is: it owns its resize and normalisation and states them, with the hash of its weights.

Shapes: `B` batch, `D` feature width, `S` spatial feature width, `K` classes. Images are uint8 `[B, H, W, 3]`: what a file
would hold, so that numbers of samples in memory and of samples from disk agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError


class Features(NamedTuple):
    """What a feature network says about images.

    Args:
        pooled: `[B, D]` float32.
        logits: `[B, K]`, or `None` for a network without classes.
        spatial: `[B, S]`, activations with their places, or `None` for a network that gives none.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNet(nn.Module, ABC):
    """A frozen network from uint8 images to features."""

    name: str
    dim: int
    distance: str
    """What results call the Fréchet distance of its features."""
    spatial_dim: int = 0

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Name, input size, resize, normalisation and the SHA-256 of the weights: equal only if the features are."""

    @abstractmethod
    def extract(self, pixels: Tensor) -> Features:
        """Features of float pixels `[B, 3, H, W]` in [0, 255], not yet resized."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images `[B, H, W, 3]`.

        Raises:
            UserError: another type or shape: rounding is part of the protocol and not done here.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"features want uint8 [B, H, W, 3], got {images.dtype} {tuple(images.shape)}", fix="round the images first"
            )
        device = next(self.parameters()).device
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.extract(images.to(device).permute(0, 3, 1, 2).contiguous().float())
        return Features(*(None if part is None else part.float() for part in found))  # type: ignore[arg-type]
