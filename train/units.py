"""The repeated units of a network: what is compiled, recomputed, gathered and freed as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..models.layers import Unit

# What costs more to compute again than to keep: products of matrices, attention, convolutions.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def units(module: nn.Module) -> list[nn.Module]:
    """The outermost `Unit`s below `module`, in its order."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, Unit) else units(child)
    return found


def compile_units(module: nn.Module) -> None:
    """Compile every unit by itself, equal ones from one graph; a network without units as a whole."""
    for part in units(module) or [module]:
        part.compile()


def recompute(module: nn.Module, what: Literal["full", "selective"]) -> None:
    """Activation checkpointing: units keep their inputs alone, and compute the rest again in the backward pass.

    Args:
        module: whose units do so.
        what: all of it, or all but the results of products, attention and convolutions.
    """
    for part in units(module):
        part.forward = _again(part.forward, what)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], what: str) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **options, **named)

    return run


def _policy(context: Any, operator: Any, *inputs: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
