"""Quantizers made of quantizers: level by level on what is left, or side by side on parts of the channels.

Shapes: `B` batch, `D` code width, `S` streams, `*` any trailing dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from ....ranges import PositiveFloat
from .base import CodeStream, Quantized, Quantizer


class _Composed(Quantizer):
    """Named parts in order; their streams one after another, their losses as `{part}_{loss}`."""

    def __init__(self, parts: Mapping[str, Quantizer], key: str) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ValueError(f"{key}: {len(parts)} given; name two or more, or use the quantizer alone")
        self.parts = nn.ModuleDict(dict(parts))
        self.codebook_size = max(part.codebook_size for part in parts.values())

    def _each(self) -> list[tuple[str, Quantizer]]:
        return list(self.parts.items())  # type: ignore[arg-type]

    @property
    def streams(self) -> tuple[CodeStream, ...]:
        """Those of the parts, named by the path that leads to them (`level0`, `left_level0`, …)."""
        return tuple(
            stream._replace(name=f"{name}_{stream.name}".rstrip("_")) for name, part in self._each() for stream in part.streams
        )

    def _split(self, indices: Tensor) -> list[Tensor]:
        """The indices of each part `[B, *]` or `[B, S, *]`, from `[B, S, *]`."""
        counts = [len(part.streams) for _, part in self._each()]
        return [part[:, 0] if part.shape[1] == 1 else part for part in indices.split(counts, dim=1)]

    def _gather(self, quantized: list[Quantized]) -> tuple[Tensor, dict[str, Tensor]]:
        """Indices `[B, S, *]` and losses of all parts."""
        indices = [
            result.indices[:, None] if len(part.streams) == 1 else result.indices
            for (_, part), result in zip(self._each(), quantized, strict=True)
        ]
        losses = {
            f"{name}_{loss}": value
            for (name, _), result in zip(self._each(), quantized, strict=True)
            for loss, value in result.losses.items()
        }
        return torch.cat(indices, dim=1), losses


class ResidualQuantizer(_Composed):
    """Each level quantizes what the levels before it have left; the latent is the sum (SoundStream, RQ-VAE).

    Level k sees its residual divided by shrink^k, and its code is multiplied by that. What is subtracted has no gradient, so
    the losses of every level reach `z`; the gradient of the latent is the levels' mean (the identity for straight-through).
    Levels should not normalise: a unit vector cannot stand for a small residual, unless `shrink` makes it one.

    Args:
        levels: quantizers of one width by name, coarse first; a name is the stream's name in the token layout.
        shrink: factor of scale from level to level; 1 for learned codebooks, below 1 for fixed ones (1/2 for LFQ).

    Raises:
        ValueError: fewer than two levels, or levels of several widths.
    """

    def __init__(self, levels: Mapping[str, Quantizer], shrink: PositiveFloat = 1.0) -> None:
        super().__init__(levels, "levels")
        widths = {name: level.dim for name, level in levels.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"levels have the widths {widths}; give all the same dim")
        self.dim, self.shrink = next(iter(widths.values())), shrink

    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`; the latent is float32."""
        residual = z.float()
        results, latents = [], []
        for depth, (_, level) in enumerate(self._each()):
            scale = self.shrink**depth
            results.append(level(residual / scale))
            latents.append(results[-1].latent * scale)
            residual = residual - latents[-1].detach()
        total = _sum([latent.detach() for latent in latents])
        path = _sum([latent - latent.detach() for latent in latents])  # zero, with the levels' gradients
        indices, losses = self._gather(results)
        return Quantized(total + path / len(latents), indices, losses)

    def embed(self, indices: Tensor) -> Tensor:
        """The sum of the code vectors `[B, D, *]` in float32 of indices `[B, S, *]`.

        Raises:
            UserError: an index is not one of its codebook's.
        """
        return self.embed_levels(indices, len(self.parts))

    def embed_levels(self, indices: Tensor, levels: int) -> Tensor:
        """What the first `levels` levels make of indices `[B, S, *]` of all: a coarser latent `[B, D, *]` in float32."""
        parts = zip(self._each()[:levels], self._split(indices), strict=False)
        return _sum([level.embed(part) * self.shrink**depth for depth, ((_, level), part) in enumerate(parts)])


class ProductQuantizer(_Composed):
    """Each part quantizes channels of its own, the first part the first `dim` channels, and so on.

    Args:
        parts: quantizers by name, of any widths; a name is the stream's name in the token layout.

    Raises:
        ValueError: fewer than two parts.
    """

    def __init__(self, parts: Mapping[str, Quantizer]) -> None:
        super().__init__(parts, "parts")
        self.dim = sum(part.dim for part in parts.values())

    def forward(self, z: Tensor) -> Quantized:
        """Quantize `[B, D, *]`; the latent is float32."""
        pieces = z.split([part.dim for _, part in self._each()], dim=1)
        results = [part(piece) for (_, part), piece in zip(self._each(), pieces, strict=True)]
        indices, losses = self._gather(results)
        return Quantized(torch.cat([result.latent for result in results], dim=1), indices, losses)

    def embed(self, indices: Tensor) -> Tensor:
        """The code vectors `[B, D, *]` in float32 of indices `[B, S, *]`, side by side.

        Raises:
            UserError: an index is not one of its codebook's.
        """
        codes = [part.embed(piece) for (_, part), piece in zip(self._each(), self._split(indices), strict=True)]
        return torch.cat(codes, dim=1)


def _sum(tensors: list[Tensor]) -> Tensor:
    """Added in order, so that `embed` gives the latent of `forward` to the last bit."""
    return reduce(torch.add, tensors)
