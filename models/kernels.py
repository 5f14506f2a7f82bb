"""The kernels behind attention: torch's own (`sdpa`), FlexAttention (`flex`), flash-attn (`flash`); which one runs, and why.

Shapes: `B` batch, `H` heads, `L` query slots, `S` slots in all, `D` head width.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Kernel = Literal["sdpa", "flex", "flash"]
HALF = (torch.bfloat16, torch.float16)
_WHERE = "strategy.attention"


def choose(
    wanted: Literal["auto", "sdpa", "flex", "flash"], device: torch.device, half: bool, causal: bool
) -> tuple[Kernel, str]:
    """The kernel for a training, and why.

    Args:
        wanted: `auto` takes flash where it is importable and the whole training can use it, else sdpa.
        device: of the network.
        half: the arithmetic is bf16 or fp16.
        causal: the plan's mask is the lower triangle; flash-attn knows no other.

    Raises:
        UserError: the one that is wanted cannot work here.
    """
    gpu = device.type == "cuda"
    if wanted == "sdpa":
        return "sdpa", "as asked"
    if wanted == "flex":
        if not gpu:
            raise UserError("flex cannot train on a CPU", where=_WHERE, fix="set strategy.attention=auto, or use a GPU")
        return "flex", "as asked; block masks from the plan"
    obstacle = _flash_obstacle(gpu, half, causal)
    if obstacle is None:
        return "flash", "as asked" if wanted == "flash" else f"{flash_name()} is installed, the mask is causal"
    if wanted == "flash":
        raise UserError(f"flash cannot be used: {obstacle}", where=_WHERE, fix="set strategy.attention=auto")
    return "sdpa", f"not flash: {obstacle}"


def _flash_obstacle(gpu: bool, half: bool, causal: bool) -> str | None:
    if not gpu:
        return "it needs a GPU"
    if not half:
        return "it needs strategy.precision bf16 or fp16"
    if not causal:
        return "it knows no mask but the causal one"
    return None if _flash() is not None else "flash-attn cannot be imported"


@functools.cache
def _flash() -> tuple[str, Callable[..., Any]] | None:
    """Name and function of flash-attn 4 or 2, where one can really be imported: a wheel for another torch cannot."""
    for name, module in (("flash-attn 4", "flash_attn.cute"), ("flash-attn 2", "flash_attn")):
        try:
            return name, __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
        except (ImportError, AttributeError, OSError, RuntimeError):
            continue
    return None


def flash_name() -> str:
    """Which flash-attn there is."""
    found = _flash()
    return found[0] if found else "none"


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """torch's scaled dot-product attention, which picks among its own kernels."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)


def flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    """flash-attn, on `[B, H, L, D]` in half precision."""
    found = _flash()
    assert found is not None
    # Norms and rotations compute in float32 under autocast; these kernels, unlike torch's, do not cast.
    parts = [part.to(value.dtype).transpose(1, 2) for part in (query, key, value)]
    mixed = found[1](*parts, softmax_scale=scale, causal=causal)
    return (mixed[0] if isinstance(mixed, tuple) else mixed).transpose(1, 2)


def flex(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float | None) -> Tensor:
    """FlexAttention with a block mask; on a CPU the unfused one, forward only."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda:
        return _compiled_flex()(query, key, value, block_mask=blocks, scale=scale)
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is unfused: here it is only compared with
        mixed: Tensor = flex_attention(query, key, value, block_mask=blocks, scale=scale)
    return mixed


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
