"""FlexVAR's multi-scale tokenizer: no residual, every scale stands for the whole image.

Shapes: `B` batch, `D` code width, `h`, `w` the finest grid, `n` tokens of one scale, `N` tokens of all scales, coarse first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from .base import TokenizerOutput
from .conv import ConvDecoder, ConvEncoder
from .multiscale import MultiScaleTokenizer, layout_of
from .multiscale_quantizer import Grid, enlarge, grids_of, shrink, to_grid, to_tokens
from .quantizers import Quantizer


class FlexVAR(MultiScaleTokenizer):
    """FlexVAR's tokenizer (Jiao et al. 2025): no residual; each scale quantizes the area-downsampled latent itself.

    Every scale alone decodes to an image of its own size, so any schedule of scales can be generated. To that end training
    draws grids anew at each step: they are quantized like the others, and their decoded images are compared (L2, the loss
    `coarse`) with the image shrunk to their size. f̂ is the newest scale alone, `[B, D, rows, columns]` on its own grid.
    The original trainer is not public; that losses of the perceptual kind see only full-size images is ours.

    Args:
        encoder: image to `[B, z_channels, h, w]`, `h` and `w` the last scale.
        decoder: the way back; same `z_channels` and `stride`.
        quantizer: any `Quantizer` with one code for each position; FlexVAR's has 4096 unit vectors of width 32.
        scales: side of each grid, or [rows, columns], coarse first.
        image_size: side, or height and width, in pixels; checked against the finest scale.
        kernel: side of the convolutions before and after the quantizer.
        drawn_scales: grids drawn at each training step, from one row to one less than the finest has. The draw follows
            torch's RNG; sizes that change make `torch.compile` recompile.
        coarse_weight: weight of the loss `coarse`.

    Raises:
        ValueError: the parts do not fit each other or the image, or more grids are to be drawn than there are.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        decoder: ConvDecoder,
        quantizer: Quantizer,
        scales: Sequence[PositiveInt | Sequence[PositiveInt]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        image_size: PositiveInt | Sequence[PositiveInt] | None = None,
        kernel: PositiveInt = 1,
        drawn_scales: NonNegativeInt = 2,
        coarse_weight: NonNegativeFloat = 1.0,
    ) -> None:
        grids = grids_of(scales)
        super().__init__(encoder, decoder, quantizer, grids, image_size, kernel)
        if len(quantizer.streams) > 1:
            raise ValueError(f"{type(quantizer).__name__} gives several codes to a position; use a quantizer that gives one")
        if drawn_scales >= grids[-1][0]:
            raise ValueError(f"drawn_scales {drawn_scales} exceeds the {grids[-1][0] - 1} grids below the finest; lower it")
        self.quantizer, self.drawn_scales, self.coarse_weight = quantizer, drawn_scales, coarse_weight

    def over(self, scales: Sequence[int | Sequence[int]]) -> FlexVAR:
        """The same networks with other scales; images are as large as the last of them describes.

        Raises:
            ValueError: they are no grids that end with the finest.
        """
        view = copy.copy(self)
        view.grids = grids_of(scales)
        view.layout = layout_of(view.grids, self.quantizer.codebook_size, self.quantizer.dim, self.layout.stride)
        return view

    def encode(self, image: Tensor) -> TokenizerOutput:
        """Codes `[B, N]` of all scales; the latents `[B, D, h, w]` are those of the finest."""
        return self._encode(image, ())[0]

    def forward(self, image: Tensor, auxiliary: bool = False) -> TokenizerOutput:
        """Reconstruct from the finest scale; in training also from the scales drawn."""
        drawn = self._draw() if self.training else ()
        output, maps = self._encode(image, drawn)
        output.reconstruction = self.decode(output.z_quantized)
        if drawn:
            fakes = [self.decode(part).float() for part in maps]
            errors = [F.mse_loss(fake, shrink(image, (fake.shape[2], fake.shape[3]))) for fake in fakes]
            output.losses["coarse"] = self.coarse_weight * torch.stack(errors).mean()
        return output

    def start(self, batch: int) -> Tensor:
        """Zeros `[B, D, rows, columns]` on the grid of the first scale."""
        return torch.zeros(batch, self.quantizer.dim, *self.grids[0], device=self.quant_conv.weight.device)

    def add_scale(self, f_hat: Tensor, k: int, values: Tensor) -> Tensor:
        """The vectors of scale `k` on its own grid, `[B, D, rows, columns]`; nothing of `f_hat` stays."""
        if values.is_floating_point():
            return to_grid(values.float(), self.grids[k])
        return self.quantizer.embed(values.unflatten(1, self.grids[k]))

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """The vectors of scale `k` upsampled to the grid of scale `k + 1`, `[B, n, D]`."""
        return to_tokens(enlarge(f_hat, self.grids[k + 1]))

    def decode_partial(self, codes: Tensor, k: int) -> Tensor:
        """Images `[B, 3, H, W]` from the last of the scales that make up the first `k` codes, enlarged to full size.

        Raises:
            UserError: `k` tokens end inside a scale.
        """
        return enlarge(super().decode_partial(codes, k), self.layout.image_size)

    def _encode(self, image: Tensor, drawn: Sequence[Grid]) -> tuple[TokenizerOutput, list[Tensor]]:
        """The output of `encode`, and the quantized maps of the grids drawn besides."""
        z = self.latent(image)
        grids = (*self.grids, *drawn)
        # Downsampled after quant_conv; all tokens pass the quantizer at once, which makes it one step for its counts.
        quantized = self.quantizer(torch.cat([shrink(z, grid).flatten(2) for grid in grids], dim=2))
        parts = quantized.latent.split([rows * columns for rows, columns in grids], dim=2)
        maps = [part.unflatten(2, grid) for part, grid in zip(parts, grids, strict=True)]
        codes = quantized.indices[:, : self.layout.total_tokens]
        last = len(self.grids) - 1
        return TokenizerOutput(codes, z, maps[last], quantized.losses), maps[last + 1 :]

    def _draw(self) -> list[Grid]:
        height, width = self.grids[-1]
        rows = (torch.randperm(height - 1)[: self.drawn_scales] + 1).tolist()
        return [(side, max(1, round(side * width / height))) for side in rows]
