"""The head that shows a tokenizer's features to a frozen teacher, for training alone (semantic regularization).

Shapes: `B` batch, `T` features of an image, `W` their width, `C` width of the teacher's.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...ranges import PositiveInt

_HEAD_RATIO = 4


class ProjectionHead(nn.Module):
    """GigaTok's: `Linear(W, 4W)` – SiLU – `Linear(4W, 4W)` – SiLU – `Linear(4W, C)`.

    Args:
        width: `W`: of the decoder's transformer (GigaTok), or of the quantizer (CNN tokenizers).
        dim: `C`; 768 for DINOv2 ViT-B.
        depth: transformer layer whose output is projected, counted from 1; nothing to tokenizers that project their latent.
    """

    def __init__(self, width: PositiveInt, dim: PositiveInt = 768, depth: PositiveInt = 3) -> None:
        super().__init__()
        self.width, self.depth, hidden = width, depth, _HEAD_RATIO * width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """`[B, T, W]` to `[B, T, C]`."""
        return self.mlp(features)


def check_head(head: ProjectionHead | None, width: int) -> None:
    """A head of a tokenizer that projects its quantized latent must be as wide.

    Raises:
        ValueError: it is not.
    """
    if head is not None and head.width != width:
        raise ValueError(f"semantic.width is {head.width}, quantizer.dim {width}; make them equal")
