"""What distillation needs of a tokenizer: its codes as vectors, and images of vectors that are no codes.

Shapes: `B` batch, `N` tokens of an image, `D` code width, `V` codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UserError
from ..tokenizers.base import Tokenizer
from ..tokenizers.multiscale import MultiScaleTokenizer
from ..tokenizers.multiscale_quantizer import MultiScaleQuantizer
from ..tokenizers.quantizers import Quantizer
from ..tokenizers.quantizers.search import nearest_code


def codebook_of(tokenizer: Tokenizer) -> Tensor:
    """Its code vectors `[V, D]` in float32, as its decoder gets them: l2-normalised where its quantizer does so.

    Raises:
        UserError: its tokens have no codebook that they share.
    """
    quantizer = getattr(tokenizer, "quantizer", None)
    if isinstance(quantizer, MultiScaleQuantizer):
        return quantizer.codebook.detach().float()
    if not isinstance(quantizer, Quantizer) or len(quantizer.streams) > 1:
        raise UserError(
            f"the tokens of this {type(tokenizer).__name__} do not share one codebook",
            fix="distil generators of tokenizers whose quantizer gives one code to a position",
        )
    every = torch.arange(quantizer.codebook_size, device=next(tokenizer.parameters()).device)
    return quantizer.embed(every[None])[0].t().detach().float().contiguous()


def decode_vectors(tokenizer: Tokenizer, vectors: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` (not clamped) of vectors `[B, N, D]` in the place of codes, not quantized; gradients pass."""
    if isinstance(tokenizer, MultiScaleTokenizer):
        f_hat = tokenizer.start(len(vectors))
        for k, part in enumerate(vectors.split([rows * columns for rows, columns in tokenizer.grids], dim=1)):
            f_hat = tokenizer.add_scale(f_hat, k, part)
        return tokenizer.decode(f_hat)
    none = torch.zeros(1, vectors.shape[1], dtype=torch.int64, device=vectors.device)
    return tokenizer.decode(vectors.transpose(1, 2).unflatten(2, tokenizer.embed(none).shape[2:]))


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Codes `[…]` int64 nearest to `vectors […, D]`."""
    return nearest_code(vectors.flatten(0, -2).float(), codebook.float()).view(vectors.shape[:-1])
