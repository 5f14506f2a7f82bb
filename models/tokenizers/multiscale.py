"""Multi-scale tokenizers: what all share, and VAR's residual pyramid (FlexVAR's kind is in flexvar.py).

Shapes: `B` batch, `D` code width, `h`, `w` the finest grid, `n` tokens of one scale, `N` tokens of all scales, coarse first.
What a generator accumulates scale by scale is called f̂ (`f_hat`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import PositiveInt
from .base import Tokenizer, TokenizerOutput
from .conv import ConvDecoder, ConvEncoder, check_halves
from .layout import Stream, TokenLayout
from .multiscale_quantizer import Grid, MultiScaleQuantizer
from .quantizers import Quantizer
from .semantic import ProjectionHead, check_head


def layout_of(grids: tuple[Grid, ...], codebook_size: int, dim: int, stride: int) -> TokenLayout:
    """The codes of grids `[rows, columns]`, coarse first, of images of which the last is the latent's grid."""
    streams = tuple(
        Stream(f"scale{k}", rows * columns, codebook_size, dim, (rows, columns), k) for k, (rows, columns) in enumerate(grids)
    )
    size = (grids[-1][0] * stride, grids[-1][1] * stride)
    return TokenLayout("multiscale", streams, size, stride, prefix_decodable=True)


class MultiScaleTokenizer(Tokenizer):
    """What the two kinds share: encoder → convolution → (quantizer) → convolution → decoder, and codes by scale.

    Args:
        encoder: image to `[B, z_channels, h, w]`.
        decoder: the way back; same `z_channels` and `stride`.
        quantizer: whose `codebook_size` and `dim` all scales share.
        grids: rows and columns of each scale, the finest last.
        image_size: in pixels; `None` takes what the finest grid describes.
        kernel: side of the convolutions before and after the quantizer.

    Raises:
        ValueError: the parts do not fit each other, or not the image.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        decoder: ConvDecoder,
        quantizer: MultiScaleQuantizer | Quantizer,
        grids: tuple[Grid, ...],
        image_size: int | Sequence[int] | None,
        kernel: int,
    ) -> None:
        super().__init__()
        check_halves(encoder, decoder)
        if kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} has no centre; make it odd")
        self.encoder, self.decoder, self.grids = encoder, decoder, grids
        self.quant_conv = nn.Conv2d(encoder.z_channels, quantizer.dim, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(quantizer.dim, decoder.z_channels, kernel, padding=kernel // 2)
        size = (grids[-1][0] * encoder.stride, grids[-1][1] * encoder.stride)
        wanted = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or size)
        if wanted != size:
            raise ValueError(
                f"the finest scale {grids[-1]} at stride {encoder.stride} describes {size} pixels, not image_size {wanted}; "
                "change the last scale, the encoder's multipliers or image_size"
            )
        self.layout = layout_of(grids, quantizer.codebook_size, quantizer.dim, encoder.stride)

    @abstractmethod
    def start(self, batch: int) -> Tensor:
        """f̂ before any scale."""

    @abstractmethod
    def add_scale(self, f_hat: Tensor, k: int, values: Tensor) -> Tensor:
        """f̂ after scale `k`: codes `[B, n]` (integer), or vectors `[B, n, D]` in their place."""

    @abstractmethod
    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """What a generator sees of f̂, after scale `k`, when it predicts scale `k + 1`: `[B, n, D]` on that scale's grid."""

    def latent(self, image: Tensor) -> Tensor:
        """The latent `[B, D, h, w]` of images `[B, 3, H, W]` in [-1, 1], before quantization.

        Raises:
            UserError: the image has another size than the layout says.
        """
        height, width = self.layout.image_size
        if image.shape[-2:] != self.layout.image_size:
            raise UserError(
                f"an image of {image.shape[-2]}x{image.shape[-1]} pixels does not fit the scales of this tokenizer",
                fix=f"use {height}x{width} pixels, or change the scales",
            )
        return self.quant_conv(self.encoder(image))

    def split(self, codes: Tensor) -> list[Tensor]:
        """Codes `[B, N]` by scale, `[B, n]` each.

        Raises:
            UserError: the number of codes is not that of the layout.
        """
        if codes.shape[1] != self.layout.total_tokens:
            raise UserError(
                f"{codes.shape[1]} codes per image, but the layout has {self.layout.total_tokens}",
                fix="give the codes of all scales, coarse first",
            )
        return list(codes.split([stream.n_tokens for stream in self.layout.streams], dim=1))

    def embed(self, codes: Tensor) -> Tensor:
        """The quantized latent `[B, D, h, w]` of codes `[B, N]`."""
        return self._grow(self.split(codes))

    def decode(self, latent: Tensor) -> Tensor:
        """Images (not clamped) from codes `[B, N]` (integer), or from a latent `[B, D, h, w]` (float)."""
        latent = latent if latent.is_floating_point() else self.embed(latent)
        return self.decoder(self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype)))

    def decode_partial(self, codes: Tensor, k: int) -> Tensor:
        """Images `[B, 3, H, W]` from the first `k` of codes `[B, N]`: whole scales.

        Raises:
            UserError: `k` tokens end inside a scale.
        """
        ends = list(accumulate(stream.n_tokens for stream in self.layout.streams))
        if k not in ends:
            allowed = ", ".join(map(str, ends))
            raise UserError(f"the first {k} tokens are not whole scales", fix=f"decode one of {allowed} tokens")
        return self.decode(self._grow(self.split(codes)[: ends.index(k) + 1]))

    def teacher_inputs(self, codes: Tensor) -> Tensor:
        """`next_input` after every scale but the last, `[B, N − n₀, D]`: what teacher forcing feeds for codes `[B, N]`.

        The first scale has no input of this kind: generators begin it with their condition.
        """
        f_hat, inputs = self.start(len(codes)), []
        for k, part in enumerate(self.split(codes)[:-1]):
            f_hat = self.add_scale(f_hat, k, part)
            inputs.append(self.next_input(f_hat, k))
        return torch.cat(inputs, dim=1) if inputs else codes.new_zeros(len(codes), 0, f_hat.shape[1], dtype=torch.float32)

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels."""
        return self.decoder.conv_out

    def _grow(self, parts: Sequence[Tensor]) -> Tensor:
        self._refuse_strangers(parts)
        f_hat = self.start(len(parts[0]))
        for k, part in enumerate(parts):
            f_hat = self.add_scale(f_hat, k, part)
        return f_hat

    def _refuse_strangers(self, parts: Sequence[Tensor]) -> None:
        # Reads numbers back from the device: codes are decoded here, never in a training step.
        if parts[0].is_meta or not len(parts[0]):
            return
        lowest, highest = (int(value) for value in torch.cat(list(parts), 1).aminmax())
        if lowest < 0 or highest >= self.layout.vocab_size:
            raise UserError(
                f"code {lowest if lowest < 0 else highest} is not one of the {self.layout.vocab_size} of this codebook",
                fix="decode codes with the tokenizer that made them",
            )


class MultiScaleVQ(MultiScaleTokenizer):
    """VAR's VQVAE: the scales of a residual pyramid add up to the latent.

    f̂ is `[B, D, h, w]` on the finest grid throughout.

    Args:
        encoder: image to `[B, z_channels, h, w]`, `h` and `w` the quantizer's last scale.
        decoder: the way back; same `z_channels` and `stride`.
        quantizer: the pyramid.
        image_size: side, or height and width, in pixels; checked against the finest scale.
        kernel: side of the convolutions before and after the quantizer (VAR: 3).
        semantic: projects the quantized latent to a teacher's width, only for training; `None`: left out.

    Raises:
        ValueError: the parts do not fit each other, or not the image.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        decoder: ConvDecoder,
        quantizer: MultiScaleQuantizer,
        image_size: PositiveInt | Sequence[PositiveInt] | None = None,
        kernel: PositiveInt = 3,
        semantic: ProjectionHead | None = None,
    ) -> None:
        check_head(semantic, quantizer.dim)
        super().__init__(encoder, decoder, quantizer, quantizer.grids, image_size, kernel)
        self.quantizer, self.semantic = quantizer, semantic

    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes `[B, N]` and latents `[B, D, h, w]` of images `[B, 3, H, W]` in [-1, 1]."""
        z = self.latent(image)
        quantized = self.quantizer(z)
        return TokenizerOutput(quantized.indices, z, quantized.latent, quantized.losses)

    def start(self, batch: int) -> Tensor:
        """Zeros `[B, D, h, w]`."""
        return self.quantizer.start(batch)

    def add_scale(self, f_hat: Tensor, k: int, values: Tensor) -> Tensor:
        """f̂ + φ(up(values)), `[B, D, h, w]`."""
        return self.quantizer.add_scale(f_hat, k, values)

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """f̂ area-downsampled to the grid of scale `k + 1`, `[B, n, D]`."""
        return self.quantizer.next_input(f_hat, k)
