"""Differentiable augmentation of what a discriminator judges (Zhao et al. 2020): images of both kinds, each time anew.

Shapes: `B` batch, `H`, `W` height and width. Images are `[B, 3, H, W]` in [-1, 1]; results may leave that range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ranges import Fraction


class DiffAug(nn.Module):
    """Random translation, colour and cutout, only while training; gradients pass to the image.

    Random numbers come from torch's CPU generator, so that a seed gives the same on every device and a resumed run goes on.

    Args:
        probability: of each of the three, drawn for the whole batch; what is drawn, differs from image to image.
        translation: largest shift, as a share of height and width; what moves in is 0.
        cutout: side of the square set to 0, as a share of height and width.
    """

    def __init__(self, probability: Fraction = 1.0, translation: Fraction = 0.125, cutout: Fraction = 0.2) -> None:
        super().__init__()
        self.probability, self.translation, self.cutout = probability, translation, cutout

    def forward(self, image: Tensor) -> Tensor:
        """Images of the same shape."""
        if not self.training:
            return image
        moves, tints, cuts = (torch.rand(3) < self.probability).tolist()
        draws = torch.rand(7, image.shape[0]).to(image.device)
        if moves:
            image = translate(image, *(_shift(draw, side, self.translation) for draw, side in _sides(draws[0:2], image)))
        if tints:
            image = recolour(image, *draws[2:5])
        if cuts:
            spans = [_span(draw, side, self.cutout) for draw, side in _sides(draws[5:7], image)]
            image = image * ~(spans[0][:, None, :, None] & spans[1][:, None, None, :])
        return image


def translate(image: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images moved by `[B]` whole pixels; what moves in is 0."""
    for axis, shift in ((2, down), (3, right)):
        side = image.shape[axis]
        source = torch.arange(side, device=image.device) - shift[:, None]
        shape = [-1, 1, 1, 1]
        shape[axis] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        image = image.gather(axis, source.clamp(0, side - 1).view(shape).expand_as(image)) * inside
    return image


def recolour(image: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Brightness ± 0.5, then saturation by 0 … 2, then contrast by 0.5 … 1.5, from draws `[B]` in [0, 1)."""
    brightness, saturation, contrast = (draw.view(-1, 1, 1, 1) for draw in (brightness, saturation, contrast))
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (2 * saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (image - mean) * (contrast + 0.5)


def _sides(draws: Tensor, image: Tensor) -> list[tuple[Tensor, int]]:
    """The draws for rows and for columns, with the height and the width."""
    return [(draws[0], image.shape[2]), (draws[1], image.shape[3])]


def _shift(draw: Tensor, side: int, share: float) -> Tensor:
    """Whole pixels, uniform from −`share` to +`share` of the side."""
    most = round(side * share)
    return (draw * (2 * most + 1)).floor().long() - most


def _span(draw: Tensor, side: int, share: float) -> Tensor:
    """Which of `side` places `[B, side]` are cut out: a stretch around a uniform centre, clipped at the border."""
    length = round(side * share)
    centre = (draw * (side + 1 - length % 2)).floor().long()
    start = (centre - length // 2)[:, None]
    places = torch.arange(side, device=draw.device)
    return (places >= start) & (places < start + length)
