"""The quantizer interface, and what quantizers of single positions share.

Shapes: `B` batch, `D` code width, `S` streams, `*` any trailing dimensions (rows and columns, tokens, …).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....errors import UserError


class Quantized(NamedTuple):
    """What a quantizer returns: the latent `[B, D, *]`, the codes, and its losses by name, already weighted.

    The codes are `[B, *]`; those of a quantizer with several streams `[B, S, *]`, in the order of `Quantizer.streams`.
    """

    latent: Tensor
    indices: Tensor
    losses: dict[str, Tensor]


class CodeStream(NamedTuple):
    """Codes that a quantizer gives to each position: a name (empty if it is the only stream), their number and width."""

    name: str
    codebook_size: int
    dim: int


class Quantizer(nn.Module, ABC):
    """Maps each position of a latent of width `dim` to a code, or to one code in each of several parallel streams.

    `codebook_size` is the number of codes; with several streams, that of the largest.
    """

    codebook_size: int
    dim: int

    @property
    def streams(self) -> tuple[CodeStream, ...]:
        """What a token layout needs to know: the streams in the order of the indices."""
        return (CodeStream("", self.codebook_size, self.dim),)

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`, any number of trailing dimensions; gradients reach `z` through the latent."""

    @abstractmethod
    def embed(self, indices: Tensor) -> Tensor:
        """The code vectors `[B, D, *]` of indices `[B, *]` or `[B, S, *]`: exactly the latent that `forward` gave with them."""


class PointwiseQuantizer(Quantizer):
    """A quantizer with one stream that sees nothing but single vectors; always in float32, whatever the autocast."""

    @abstractmethod
    def quantize(self, z: Tensor) -> Quantized:
        """Quantize float32 vectors `[…, D]`; the latent has their shape."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors `[…, D]` in float32 of indices `[…]`."""

    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`; the latent is float32."""
        with torch.autocast(z.device.type, enabled=False):
            # Contiguous: the latent then has the strides that `embed` gives it, whatever those of `z`.
            latent, indices, losses = self.quantize(z.float().movedim(1, -1).contiguous())
        return Quantized(latent.movedim(-1, 1), indices, losses)

    def embed(self, indices: Tensor) -> Tensor:
        """The code vectors `[B, D, *]` in float32 of indices `[B, *]`.

        Raises:
            UserError: an index is not one of the codebook's (not told inside a compiled graph).
        """
        self._refuse_strangers(indices)
        with torch.autocast(indices.device.type, enabled=False):
            return self.lookup(indices).movedim(-1, 1)

    def _refuse_strangers(self, indices: Tensor) -> None:
        # Reads two numbers back from the device: codes are embedded to be decoded, never in a training step.
        if torch.compiler.is_compiling() or indices.is_meta or not indices.numel():
            return
        lowest, highest = (int(value) for value in indices.aminmax())
        if lowest < 0 or highest >= self.codebook_size:
            raise UserError(
                f"code {lowest if lowest < 0 else highest} is not one of the {self.codebook_size} of this codebook",
                fix="decode codes with the tokenizer that made them",
            )


def straight_through(q: Tensor, z: Tensor) -> Tensor:
    """The value of `q`, bit by bit, with the gradient of `z`."""
    return q.detach() + (z - z.detach())


def rotated(q: Tensor, z: Tensor) -> Tensor:
    """The value of `q`, bit by bit, with gradients rotated and scaled from q's direction to z's (Fifty et al. 2024).

    The gradient is that of |q|/|z| · R z, where R = I − 2 r rᵀ + 2 q̂ ẑᵀ, r = (ẑ + q̂)/|ẑ + q̂|, is held fixed: it turns ẑ onto q̂.

    Args:
        q: code vectors `[…, D]`.
        z: the vectors they stand for, same shape.
    """
    fixed, q = z.detach(), q.detach()
    z_unit, q_unit = F.normalize(fixed, dim=-1), F.normalize(q, dim=-1)
    middle = F.normalize(z_unit + q_unit, dim=-1)
    turned = z - 2 * _dot(z, middle) * middle + 2 * _dot(z, z_unit) * q_unit
    stretch = q.norm(dim=-1, keepdim=True) / fixed.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return straight_through(q, stretch * turned)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
