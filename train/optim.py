"""Optimizers over whatever tensors a rank updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..conf.spine import Optim


def make_optimizer(config: Optim, module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
    """AdamW or Adam, fused, decayed parameters and others in two groups.

    Matrices and convolutions are decayed, but for those whose name ends in one that the module lists as `undecayed`; biases,
    norms and other one-dimensional parameters only with `decay_vectors`.

    Args:
        config: kind, rate, decay.
        module: says of each parameter what it is.
        tensors: what is updated, parameters or shards of them, by name.
    """
    exempt: tuple[str, ...] = getattr(module, "undecayed", ())
    dims = {name: value.ndim for name, value in module.named_parameters()}
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, tensor in tensors:
        is_decayed = config.decay_vectors or (dims[name] >= 2 and not name.endswith(exempt))
        (decayed if is_decayed else others).append(tensor)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "decayed": True},
        {"params": others, "weight_decay": 0.0, "decayed": False},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of every element, besides its count of steps."""


def moments(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one master: `MOMENTS`, laid out like it, and `step`; where there is none, that before a step."""
    state = optimizer.state[master]
    if not state:
        for name in MOMENTS:
            state[name] = torch.zeros_like(master, memory_format=torch.preserve_format)
        # A fused optimizer keeps its count beside the parameter.
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
    return {name: state[name] for name in (*MOMENTS, "step")}
