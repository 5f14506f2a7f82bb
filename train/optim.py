"""Optimizers, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..conf.spine import Optim
from ..errors import UserError


def make_optimizer(config: Optim, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or Adam over the trainable parameters of `module`, decayed ones and others in two groups.

    Matrices and convolutions are decayed, but for those whose name ends in one that the module lists as `undecayed`; biases,
    norms and other one-dimensional parameters only with `decay_vectors`.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    exempt: tuple[str, ...] = getattr(module, "undecayed", ())

    def is_decayed(name: str, parameter: nn.Parameter) -> bool:
        return config.decay_vectors or (parameter.ndim >= 2 and not name.endswith(exempt))

    decayed = [parameter for name, parameter in named if is_decayed(name, parameter)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "decayed": True},
        {"params": others, "weight_decay": 0.0, "decayed": False},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def export_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as tensors named `{moment}/{parameter}`: independent of parameter order and groups."""
    return {
        f"{key}/{name}": value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def import_state(optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, Tensor], *, where: object) -> None:
    """The inverse of `export_state`.

    Raises:
        UserError: the state names parameters that `module` does not have.
    """
    parameters = dict(module.named_parameters())
    for key, value in state.items():
        moment, _, name = key.partition("/")
        if name not in parameters:
            raise UserError(
                f"optimizer state of an unknown parameter {name}", where=where, fix="resume with the config of that run"
            )
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # In the parameter's own memory format: a fused optimizer walks both as raw memory.
            optimizer.state[parameter][moment] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:
            # `step` stays on the CPU unless the optimizer is fused on a GPU, where it lives beside the parameter.
            optimizer.state[parameter][moment] = value.to(parameter.device if parameter.is_cuda else value.device).clone()
