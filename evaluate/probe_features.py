"""What a linear probe reads: one vector per image from the frozen tokens of a tokenizer, or from a generator that reads them.

Shapes: `B` batch, `D` width of a token, `N` tokens, `C` width of a generator. Images are `[B, 3, H, W]` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.generators.base import Generator
from ..models.tokenizers.base import Tokenizer

Tokens = Literal["latent", "quantized", "encoder"]
Pool = Literal["mean", "concat"]
Extract = Callable[[Tensor], Tensor]


def token_features(tokenizer: Tokenizer, tokens: Tokens, pool: Pool) -> Extract:
    """A function from images to vectors `[B, D]` (`pool` mean) or `[B, D·N]` (concat) of the tokenizer's tokens.

    Args:
        tokenizer: frozen, in eval mode.
        tokens: `latent` before quantization, `quantized` after it, or `encoder`: what enters the convolution before the
            quantizer (GigaTok's encoder width).
        pool: over the tokens; positions of the finest grid for a multi-scale tokenizer.

    Raises:
        UserError: `encoder`, and the tokenizer has no such convolution.
    """
    if tokens == "encoder" and not isinstance(getattr(tokenizer, "quant_conv", None), nn.Module):
        raise UserError(
            f"{type(tokenizer).__name__} has no encoder output of its own",
            where="probe.tokens=encoder",
            fix="set probe.tokens=latent",
        )

    def extract(image: Tensor) -> Tensor:
        if tokens == "encoder":
            taken = tap_input(tokenizer.quant_conv, lambda: tokenizer.encode(image))  # type: ignore[arg-type]
        else:
            output = tokenizer.encode(image)
            taken = output.z_quantized if tokens == "quantized" else output.z_before
        by_token = taken.float().flatten(2)
        return by_token.mean(2) if pool == "mean" else by_token.flatten(1)

    return extract


def generator_features(generator: Generator, tokenizer: Tokenizer) -> Extract:
    """A function from images to `[B, C]`: the mean over slots of what leaves the middle block, without a class.

    GigaTok's probe of autoregressive models: hidden states after block `layers // 2`.

    Raises:
        UserError: the generator is no stack of blocks.
    """
    blocks = getattr(getattr(generator, "transformer", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise UserError(f"{type(generator).__name__} has no middle block to probe", fix="probe its tokenizer instead")
    following = blocks[len(blocks) // 2]

    def extract(image: Tensor) -> Tensor:
        codes = tokenizer.encode(image).codes
        condition = torch.full((len(codes),), generator.null_class, device=codes.device)
        return tap_input(following, lambda: generator.logits(codes, condition)).float().mean(1)

    return extract


def tap_input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The first input that `module` gets while `run` runs."""
    taken: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        run()
    finally:
        handle.remove()
    return taken[0]
