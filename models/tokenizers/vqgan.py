"""The VQ-GAN tokenizer: a convolutional encoder, a quantizer, a convolutional decoder; one code per cell of a grid.

Shapes: `B` batch, `D` code width, `h`, `w` rows and columns of the grid, `S` streams of the quantizer (mostly 1),
`N = S*h*w` tokens: stream by stream, each in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...errors import UserError
from ...ranges import PositiveInt
from .base import Tokenizer, TokenizerOutput
from .conv import ConvDecoder, ConvEncoder, check_halves
from .layout import TokenLayout, raster_layout
from .quantizers import Quantizer
from .semantic import ProjectionHead, check_head


class VQGAN(Tokenizer):
    """LlamaGen's VQ tokenizer (and taming's, IBQ, Open-MAGVIT2): encoder → 1x1 conv → quantizer → 1x1 conv → decoder.

    Args:
        encoder: image to `[B, z_channels, h, w]`.
        decoder: the way back; same `z_channels` and `stride`.
        quantizer: any `Quantizer`; the 1x1 convolutions lead to its width and back.
        image_size: side, or height and width, of the images that the layout describes; others whose sides are
            multiples of the stride can be encoded too.
        project: false leaves the 1x1 convolutions out (Open-MAGVIT2): the encoder's latent is quantized as it is.
        semantic: projects the quantized latent to a teacher's width, only for training; `None`: left out.

    Raises:
        ValueError: encoder, decoder and quantizer do not fit each other, or the image size does not fit the stride.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        decoder: ConvDecoder,
        quantizer: Quantizer,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        project: bool = True,
        semantic: ProjectionHead | None = None,
    ) -> None:
        super().__init__()
        check_halves(encoder, decoder)
        if not project and encoder.z_channels != quantizer.dim:
            raise ValueError(
                f"z_channels is {encoder.z_channels}, but the quantizer's width is {quantizer.dim}; "
                "make them equal, or set project=true"
            )
        check_head(semantic, quantizer.dim)
        self.encoder, self.decoder, self.quantizer, self.semantic = encoder, decoder, quantizer, semantic
        self.stride = encoder.stride
        self.quant_conv = nn.Conv2d(encoder.z_channels, quantizer.dim, 1) if project else nn.Identity()
        self.post_quant_conv = nn.Conv2d(quantizer.dim, decoder.z_channels, 1) if project else nn.Identity()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or any(side % self.stride for side in size):
            raise ValueError(f"image_size {size} is not two multiples of the stride {self.stride}; choose multiples of it")
        self.layout = self.layout_for(size)

    def layout_for(self, image_size: Sequence[int]) -> TokenLayout:
        """The layout of images of another height and width.

        Raises:
            UserError: a side is not a multiple of the stride.
        """
        height, width = image_size
        if height % self.stride or width % self.stride or not height or not width:
            raise UserError(
                f"an image of {height}x{width} pixels does not fit the grid of this tokenizer",
                fix=f"use sides that are multiples of {self.stride}",
            )
        grid = (height // self.stride, width // self.stride)
        layout = raster_layout(grid, self.quantizer.codebook_size, self.quantizer.dim, self.stride)
        return layout.parallel(self.quantizer.streams)

    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes `[B, N]` and latents `[B, D, h, w]` of images `[B, 3, H, W]` in [-1, 1].

        Raises:
            UserError: the sides do not fit the stride.
        """
        self.layout_for(image.shape[-2:])
        z = self.quant_conv(self.encoder(image))
        quantized = self.quantizer(z)
        return TokenizerOutput(quantized.indices.flatten(1), z, quantized.latent, quantized.losses)

    def embed(self, codes: Tensor) -> Tensor:
        """Quantized latent `[B, D, h, w]` of codes `[B, N]` on the layout's grid, or `[B, h, w]` on any grid.

        With several streams, codes of any grid are `[B, S, h, w]`.

        Raises:
            UserError: the number of codes is not that of the layout, or a code is not one of the codebook's.
        """
        if codes.dim() == 2:
            if codes.shape[1] != self.layout.total_tokens:
                raise UserError(
                    f"{codes.shape[1]} codes per image, but the layout has {self.layout.total_tokens}",
                    fix="give codes of images of the layout's size, or shape them [B, rows, columns]",
                )
            streams, grid = len(self.layout.streams), self.layout.streams[0].grid or ()
            codes = codes.unflatten(1, grid if streams == 1 else (streams, *grid))
        return self.quantizer.embed(codes)

    def decode(self, latent: Tensor) -> Tensor:
        """Images (not clamped) from codes `[B, N]` or `[B, h, w]` (integer), or from a latent `[B, D, h, w]` (float)."""
        latent = latent if latent.is_floating_point() else self.embed(latent)
        return self.decoder(self.post_quant_conv(latent.to(self.decoder.conv_in.weight.dtype)))

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels."""
        return self.decoder.conv_out
