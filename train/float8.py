"""Products of matrices in float8, by torchao: bf16 everywhere else, weights stay in float32."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError

LEAST = (8, 9)
"""Compute capability of the first GPUs that multiply float8 (Ada; Hopper is 9.0): NVIDIA's CUDA C++ Programming Guide."""
MULTIPLE = 16
"""Both sides of a matrix must be multiples of this for those products: torch's `_scaled_mm`."""


def check_float8(device: torch.device) -> None:
    """Make sure that a device multiplies float8.

    Raises:
        UserError: it does not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST:
        what = f"fp8 needs a GPU of compute capability {LEAST[0]}.{LEAST[1]} or more (L40, H100, …)"
        raise UserError(what, where="strategy.precision=fp8", fix="set strategy.precision=bf16")


def to_float8(module: nn.Module, emulate: bool = False) -> None:
    """Let the linear layers of `module` multiply in float8, each tensor scaled by its own largest value (e4m3; gradients e5m2).

    Weights, their names and everything that a checkpoint holds stay as they are.

    Args:
        module: changed in place.
        emulate: compute the rounded products in higher precision, on any device: for tests.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("fp8 needs torchao", where="strategy.precision=fp8", fix="pip install 'tokar[fp8]'") from error

    def fits(part: nn.Module, name: str) -> bool:
        return isinstance(part, nn.Linear) and part.in_features % MULTIPLE == part.out_features % MULTIPLE == 0

    convert_to_float8_training(module, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)
