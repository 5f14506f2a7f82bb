"""A small image classifier: the embedded judge of samples and the default feature network of evaluation.

Shapes: `B` batch, `C` feature width, `K` classes. Images are `[B, 3, H, W]` in [-1, 1].
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from ..ranges import Fraction, PositiveInt
from .layers import Unit

GROUPS = 8
SMALLEST_GRID = 4


class DownBlock(Unit):
    """Halve the grid, then one residual convolution; group norm, so that a batch of one is judged like any other."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.down_norm = nn.GroupNorm(GROUPS, channels_out)
        self.conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_norm = nn.GroupNorm(GROUPS, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C_in, H, W]` to `[B, C_out, H/2, W/2]`."""
        x = F.silu(self.down_norm(self.down(x)))
        return x + F.silu(self.conv_norm(self.conv(x)))


class Classifier(nn.Module):
    """Convolutions down to a 4-pixel grid (or the last one above it), mean over the grid, dropout, one linear layer.

    Args:
        image_size: side in pixels of the images it judges; at least 8.
        num_classes: number of classes.
        width: channels of the first block, a multiple of 8; doubles with each block up to four times as many.
        dropout: probability that a feature is dropped before the linear layer.

    Raises:
        ValueError: the image is too small or the width does not divide into groups.
    """

    def __init__(
        self, image_size: PositiveInt, num_classes: PositiveInt, width: PositiveInt = 32, dropout: Fraction = 0.1
    ) -> None:
        super().__init__()
        if image_size < 2 * SMALLEST_GRID:
            raise ValueError(f"image_size {image_size} is below {2 * SMALLEST_GRID}; use larger images")
        if width % GROUPS:
            raise ValueError(f"width {width} is no multiple of {GROUPS}; round it up")
        blocks = (image_size // SMALLEST_GRID).bit_length() - 1
        widths = [3, *(width * min(2**i, 4) for i in range(blocks))]
        self.image_size, self.num_classes, self.feature_dim = image_size, num_classes, widths[-1]
        self.blocks = nn.Sequential(*(DownBlock(a, b) for a, b in pairwise(widths)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def features(self, image: Tensor) -> Tensor:
        """Penultimate activations `[B, C]`, without dropout."""
        return self.blocks(image).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits `[B, K]` of features `[B, C]`."""
        return self.head(self.dropout(features))

    def forward(self, image: Tensor) -> Tensor:
        """Logits `[B, K]`."""
        return self.classify(self.features(image))
