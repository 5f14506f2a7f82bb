"""TiTok (Yu et al. 2024): a transformer reads an image's patches into a few tokens, another paints patches from them.

Shapes: `B` batch, `W` width of a transformer, `h`, `w` rows and columns of patches, `P = h*w`, `K` tokens, `D` code width,
`V` proxy codes, `Z` width of a proxy code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ranges import PositiveInt
from .adaptive import spread
from .base import Tokenizer, TokenizerOutput
from .layout import Stream, TokenLayout
from .maskgit import MaskGITDecoder
from .quantizers import Quantizer
from .vit import EncoderLayer, grid_of, init_truncated, position_table


class PatchTransformer(nn.Module):
    """What both halves are: pre-norm layers over a class vector, the patches and the tokens, with learned positions.

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        tokens: `K`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a patch.

    Raises:
        ValueError: the patches do not fill the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        width: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        tokens: PositiveInt = 64,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
    ) -> None:
        super().__init__()
        self.width, self.tokens, self.patch = width, tokens, patch
        self.grid = grid_of(image_size, patch)
        self.patches = self.grid[0] * self.grid[1]
        self.class_embedding = position_table(1, width)
        self.positions = position_table(1 + self.patches, width)  # of the class vector, then of the patches
        self.token_positions = position_table(tokens, width)
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    def _through(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """What leaves the last layer, `[B, 1 + P + K, W]`, not normalised; of `[B, P, W]` and `[B, K, W]`."""
        first = self.class_embedding.expand(patches.shape[0], -1, -1)
        placed = torch.cat([first, patches], dim=1) + self.positions
        x = self.norm_in(torch.cat([placed, tokens + self.token_positions], dim=1))
        for layer in self.layers:
            x = layer(x)
        return x


class PatchEncoder(PatchTransformer):
    """An image's patches to tokens: learned vectors that see all of them.

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        tokens: `K`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a patch.

    Raises:
        ValueError: the patches do not fill the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        width: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        tokens: PositiveInt = 64,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
    ) -> None:
        super().__init__(width, layers, heads, tokens, image_size, patch)
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.queries = position_table(tokens, width)

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] to tokens `[B, K, W]`."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = self._through(patches, self.queries.expand(image.shape[0], -1, -1))
        return self.norm_out(x[:, 1 + self.patches :])


class PatchDecoder(PatchTransformer):
    """Tokens to a map of patches: one learned vector in every place, which sees the tokens.

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        tokens: `K`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a patch.

    Raises:
        ValueError: the patches do not fill the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        width: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        tokens: PositiveInt = 64,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
    ) -> None:
        super().__init__(width, layers, heads, tokens, image_size, patch)
        self.mask_token = position_table(1, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, K, W]` to a map `[B, W, h, w]`."""
        x = self._through(self.mask_token.expand(tokens.shape[0], self.patches, -1), tokens)
        # Contiguous, so that the weight's memory format decides about the map's: a transposed view looks channels-last.
        return self.norm_out(x[:, 1 : 1 + self.patches]).transpose(1, 2).unflatten(2, self.grid).contiguous()


class PixelHead(nn.Module):
    """A map of patches straight to pixels: a 1x1 convolution to every patch's pixels, then a 3x3 one over the image.

    Args:
        width: `W`, that of the token decoder.
        patch: pixels a side of a patch.
    """

    def __init__(self, width: PositiveInt = 1024, patch: PositiveInt = 16) -> None:
        super().__init__()
        self.width, self.stride = width, patch
        self.conv_in = nn.Conv2d(width, 3 * patch * patch, 1)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, patches: Tensor) -> Tensor:
        """`[B, W, h, w]` to an image `[B, 3, h*patch, w*patch]` in [0, 1], not clamped."""
        return self.conv_out(spread(self.conv_in(patches), self.stride))

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels."""
        return self.conv_out


class ProxyHead(nn.Module):
    """A map of patches to the codes of another tokenizer, MaskGIT's VQ-GAN, whose decoder paints their weighted mean.

    1x1 convolution to `2W` – tanh – 1x1 convolution to `V` logits – softmax over the proxy codebook – decoder.

    Args:
        decoder: paints latents of `Z` channels.
        width: `W`, that of the token decoder.
        codebook_size: number of proxy codes `V`.
    """

    def __init__(self, decoder: MaskGITDecoder, width: PositiveInt = 768, codebook_size: PositiveInt = 1024) -> None:
        super().__init__()
        self.width, self.stride = width, decoder.stride
        self.conv_in = nn.Conv2d(width, 2 * width, 1)
        self.conv_logits = nn.Conv2d(2 * width, codebook_size, 1)
        self.codebook = nn.Parameter(torch.empty(codebook_size, decoder.z_channels))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)
        self.cnn = decoder

    def forward(self, patches: Tensor) -> Tensor:
        """`[B, W, h, w]` to an image `[B, 3, h*stride, w*stride]` in [0, 1], not clamped."""
        shares = self.conv_logits(self.conv_in(patches).tanh()).softmax(1)
        return self.cnn(torch.einsum("bvhw,vz->bzhw", shares, self.codebook))

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels."""
        return self.cnn.conv_out


class TiTok(Tokenizer):
    """Patches and learned tokens → transformer → 1x1 conv → quantizer → linear → transformer → head, for images of one size.

    Args:
        token_encoder: an image to `K` tokens.
        quantizer: any `Quantizer`.
        token_decoder: the tokens to a map of patches.
        head: that map to an image: `PixelHead`, or `ProxyHead` for weights trained in two stages.
        image_size: side, or height and width, of the images.
        legacy_reshape: read the encoder's `[K, W]` tokens as `[W, K]` without a transpose, as the first published weights
            (S-128, B-64, L-32) do: a slip that mixes tokens with channels, but always in the same way.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        token_encoder: PatchEncoder,
        quantizer: Quantizer,
        token_decoder: PatchDecoder,
        head: PixelHead | ProxyHead,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        legacy_reshape: bool = False,
    ) -> None:
        super().__init__()
        self.token_encoder, self.quantizer, self.token_decoder, self.head = token_encoder, quantizer, token_decoder, head
        self.legacy_reshape = legacy_reshape
        self.quant_conv = nn.Conv2d(token_encoder.width, quantizer.dim, 1)
        self.post_quant = nn.Linear(quantizer.dim, token_decoder.width)
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self._check(size)
        for part in (token_encoder, token_decoder, head, self.quant_conv, self.post_quant):
            init_truncated(part)
        token = Stream("token", token_encoder.tokens, quantizer.codebook_size, quantizer.dim)
        self.layout = TokenLayout("sequence", (token,), size, 0).parallel(quantizer.streams)

    def _check(self, size: tuple[int, int]) -> None:
        """Both transformers must speak of the same tokens and image, and the head must paint the decoder's patches."""
        first, last, head = self.token_encoder, self.token_decoder, self.head
        if first.tokens != last.tokens:
            raise ValueError(f"token_encoder has {first.tokens} tokens, token_decoder {last.tokens}; make them equal")
        for name, part in (("token_encoder", first), ("token_decoder", last)):
            if (part.grid[0] * part.patch, part.grid[1] * part.patch) != size:
                raise ValueError(
                    f"{name} has {part.grid[0]}x{part.grid[1]} patches of {part.patch} pixels, which are not an image of "
                    f"{size[0]}x{size[1]}; give all the same image_size"
                )
        for key, ours, theirs in (("width", head.width, last.width), ("stride", head.stride, last.patch)):
            if ours != theirs:
                other = "patch" if key == "stride" else key
                raise ValueError(f"{key} is {ours} in head, but {other} is {theirs} in token_decoder; make them equal")

    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes `[B, K]` and latents `[B, D, 1, K]` of images `[B, 3, H, W]` in [-1, 1].

        Raises:
            UserError: images of another size than the layout's.
        """
        self.layout.refuse_other_image(image.shape[-2:])
        tokens = self.token_encoder((image + 1) / 2)
        # The legacy reading must be of memory in the order [B, K, W].
        channels = tokens.reshape(-1, tokens.shape[2], tokens.shape[1]) if self.legacy_reshape else tokens.transpose(1, 2)
        z = self.quant_conv(channels.unsqueeze(2))
        quantized = self.quantizer(z)
        return TokenizerOutput(quantized.indices.flatten(1), z, quantized.latent, quantized.losses)

    def embed(self, codes: Tensor) -> Tensor:
        """Quantized latent `[B, D, 1, K]` of codes `[B, K]`.

        Raises:
            UserError: the number of codes is not that of the layout.
        """
        self.layout.refuse_other_count(codes.shape[1])
        streams, row = len(self.layout.streams), (1, self.token_encoder.tokens)
        return self.quantizer.embed(codes.unflatten(1, row if streams == 1 else (streams, *row)))

    def decode(self, latent: Tensor) -> Tensor:
        """Images (not clamped) from codes `[B, K]` (integer) or a quantized latent (float)."""
        latent = latent if latent.is_floating_point() else self.embed(latent)
        tokens = self.post_quant(latent.flatten(2).transpose(1, 2).to(self.post_quant.weight.dtype))
        return 2 * self.head(self.token_decoder(tokens)) - 1

    def last_layer(self) -> nn.Module:
        """The convolution that writes the pixels, in [0, 1]."""
        return self.head.last_layer()
