"""The Tokenizer interface: images to codes and back.

Shapes: `B` batch, `N` tokens (`layout.total_tokens`), `D` code width. Images are `[B, 3, H, W]` in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...errors import UserError
from .layout import TokenLayout
from .semantic import ProjectionHead


@dataclass
class TokenizerOutput:
    """What `encode` returns, and `forward` with the reconstruction filled in.

    Args:
        codes: `[B, N]` int64, in layout order.
        z_before: latent before quantization, the quantizer's own shape.
        z_quantized: latent after it, with the gradient estimator attached.
        losses: the quantizer's scalar losses by name, already weighted (`commitment`, `codebook`, …).
        reconstruction: `[B, 3, H, W]`, not clamped; `None` from `encode`.
        shortcut: a second reconstruction that bypasses the quantizer, from `forward(…, auxiliary=True)` of tokenizers that
            have one (GigaTok); trained with the same image losses.
        semantic: `[B, T, C]` features projected to a teacher's width, from `forward` of tokenizers that have such a head.
    """

    codes: Tensor
    z_before: Tensor
    z_quantized: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: Tensor | None = None
    shortcut: Tensor | None = None
    semantic: Tensor | None = None


class Tokenizer(nn.Module, ABC):
    """A network that turns an image into integer codes and codes into an image."""

    layout: TokenLayout
    semantic: ProjectionHead | None
    """Projects `semantic_feature` to a teacher's width while training; published weights have none but GigaTok's."""

    def __init__(self) -> None:
        super().__init__()
        self.semantic = None

    @abstractmethod
    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes and latents of images `[B, 3, H, W]` in [-1, 1]."""

    @abstractmethod
    def embed(self, codes: Tensor) -> Tensor:
        """Quantized latent of codes `[B, N]`, the shape of `z_quantized`."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` (not clamped) from codes `[B, N]` (integer) or a quantized latent (float)."""

    @abstractmethod
    def last_layer(self) -> nn.Module:
        """The layer that writes the pixels: its weight scales the adaptive GAN loss."""

    def semantic_feature(self, output: TokenizerOutput) -> Tensor:
        """What `semantic` projects, `[B, T, W]`: the quantized latent, one feature for each place."""
        return output.z_quantized.flatten(2).transpose(1, 2)

    def decode_partial(self, codes: Tensor, k: int) -> Tensor:
        """Images from the first `k` tokens alone.

        Raises:
            UserError: the layout is not prefix-decodable.
        """
        raise UserError(
            f"{type(self).__name__} cannot decode a prefix of its {self.layout.kind} tokens", fix="decode all tokens instead"
        )

    def forward(self, image: Tensor, auxiliary: bool = False) -> TokenizerOutput:
        """Encode, quantize and decode: what a training step needs.

        Args:
            image: `[B, 3, H, W]` in [-1, 1].
            auxiliary: also compute what only an early part of training asks for (`shortcut`, the `feature` loss), where the
                tokenizer has it.
        """
        output = self.encode(image)
        if self.semantic is not None:
            output.semantic = self.semantic(self.semantic_feature(output))
        output.reconstruction = self.decode(output.z_quantized)
        return output
