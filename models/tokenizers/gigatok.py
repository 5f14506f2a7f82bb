"""GigaTok (Xiong et al. 2025): a CNN and a transformer on either side of the quantizer, tokens in a row or on a grid.

Shapes: `B` batch, `D` code width, `Z` channels of a map, `W` width of a transformer, `h`, `w` rows and columns of the CNN's
map, `P = h*w`, `N` tokens, `C` width of a teacher's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import NonNegativeFloat, PositiveInt
from .base import Tokenizer, TokenizerOutput
from .conv import ConvDecoder, ConvEncoder
from .latent_transformers import LatentTransformer
from .layout import Stream, TokenLayout
from .quantizers import Quantizer
from .semantic import ProjectionHead
from .vit import init_truncated


class GigaTok(Tokenizer):
    """CNN → transformer → 1x1 conv → quantizer → 1x1 conv → transformer → CNN, for images of one size.

    Args:
        encoder: image to a map `[B, Z, h, w]`.
        token_encoder: that map to tokens, `TokenEncoder` (1-D) or `GridTransformer` (2-D).
        quantizer: any `Quantizer`; the 1x1 convolutions lead to its width and back.
        token_decoder: tokens to a map again, `TokenDecoder` or `GridTransformer`.
        decoder: map to image.
        semantic: projects a layer of `token_decoder` to a teacher's width, only for training; `None`: left out.
        image_size: side, or height and width, of the images.
        feature_weight: of the loss `feature`, the mean squared error between the two maps, sg(encoder's) and decoder's.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        token_encoder: LatentTransformer,
        quantizer: Quantizer,
        token_decoder: LatentTransformer,
        decoder: ConvDecoder,
        semantic: ProjectionHead | None = None,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        feature_weight: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.token_encoder, self.quantizer = encoder, token_encoder, quantizer
        self.token_decoder, self.decoder, self.semantic = token_decoder, decoder, semantic
        self.feature_weight = feature_weight
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self._check(size)
        for part in (encoder, token_encoder, token_decoder, decoder, semantic):
            if part is not None:
                init_truncated(part)
        # These two keep PyTorch's initialisation, as the original does.
        self.quant_conv = nn.Conv2d(encoder.z_channels, quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.dim, decoder.z_channels, 1)
        self.layout = self._layout(size)

    def _check(self, size: tuple[int, int]) -> None:
        """Maps must go from each part to the next, and the semantic head must find its layer."""
        parts = {name: getattr(self, name) for name in ("encoder", "token_encoder", "token_decoder", "decoder")}
        for (name, part), (next_name, following) in pairwise(parts.items()):
            if part.z_channels != following.z_channels:
                raise ValueError(
                    f"z_channels is {part.z_channels} in {name}, {following.z_channels} in {next_name}; make them equal"
                )
        first, last = self.token_encoder, self.token_decoder
        if first.size_out != last.size_in or first.size_in != last.size_out:
            raise ValueError(
                f"token_encoder turns {first.size_in} into {first.size_out}, token_decoder {last.size_in} into "
                f"{last.size_out}; give both the same image_size, patch and tokens"
            )
        for name, stride in (("encoder", self.encoder.stride), ("decoder", self.decoder.stride)):
            if (size[0] / stride, size[1] / stride) != first.size_in:
                raise ValueError(
                    f"{name} has stride {stride}, but the transformers see a grid of {first.size_in} for images of {size}; "
                    "set patch to the stride and image_size to that of the images"
                )
        if self.semantic is not None and self.semantic.width != last.width:
            raise ValueError(f"semantic.width is {self.semantic.width}, token_decoder.width {last.width}; make them equal")
        if self.semantic is not None and self.semantic.depth > len(last.layers):
            raise ValueError(f"semantic.depth is {self.semantic.depth}, but token_decoder has {len(last.layers)} layers")

    def _layout(self, size: tuple[int, int]) -> TokenLayout:
        rows, columns = self.token_encoder.size_out
        kind = self.token_encoder.kind
        name, grid, stride = ("patch", (rows, columns), self.encoder.stride) if kind == "raster" else ("token", None, 0)
        stream = Stream(name, rows * columns, self.quantizer.codebook_size, self.quantizer.dim, grid)
        return TokenLayout(kind, (stream,), size, stride).parallel(self.quantizer.streams)

    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes `[B, N]` and latents `[B, D, 1, N]` (2-D: `[B, D, h, w]`) of images `[B, 3, H, W]` in [-1, 1].

        Raises:
            UserError: images of another size than the layout's.
        """
        return self._encode(image)[0]

    def _encode(self, image: Tensor) -> tuple[TokenizerOutput, Tensor]:
        self.layout.refuse_other_image(image.shape[-2:])
        spatial = self.encoder(image)
        z = self.quant_conv(self.token_encoder(spatial)[0])
        quantized = self.quantizer(z)
        return TokenizerOutput(quantized.indices.flatten(1), z, quantized.latent, quantized.losses), spatial

    def embed(self, codes: Tensor) -> Tensor:
        """Quantized latent `[B, D, 1, N]` (2-D: `[B, D, h, w]`) of codes `[B, N]`.

        Raises:
            UserError: the number of codes is not that of the layout.
        """
        self.layout.refuse_other_count(codes.shape[1])
        streams, size = len(self.layout.streams), self.token_encoder.size_out
        return self.quantizer.embed(codes.unflatten(1, size if streams == 1 else (streams, *size)))

    def decode(self, latent: Tensor) -> Tensor:
        """Images (not clamped) from codes `[B, N]` (integer) or a quantized latent (float)."""
        return self.decoder(self._restore(latent if latent.is_floating_point() else self.embed(latent))[0])

    def _restore(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map that the CNN decodes, and the features for the semantic head."""
        depth = 0 if self.semantic is None else self.semantic.depth
        restored: tuple[Tensor, Tensor | None] = self.token_decoder(
            self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype)), depth
        )
        return restored

    def forward(self, image: Tensor, auxiliary: bool = False) -> TokenizerOutput:
        """Encode, quantize and decode, with `semantic` `[B, P, C]` where there is a head for it.

        Args:
            image: `[B, 3, H, W]` in [-1, 1].
            auxiliary: also the `shortcut`, the image that the CNN alone gives, and the loss `feature`.
        """
        output, spatial = self._encode(image)
        restored, features = self._restore(output.z_quantized)
        if self.semantic is not None:
            output.semantic = self.semantic(features)
        if auxiliary:
            distance = F.mse_loss(restored.float(), spatial.detach().float())
            output.losses["feature"] = self.feature_weight * distance
            # Before the reconstruction: what looks at the last layer (the adaptive weight) must see that one last.
            output.shortcut = self.decoder(spatial)
        output.reconstruction = self.decoder(restored)
        return output

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels."""
        return self.decoder.conv_out
