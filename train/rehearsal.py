"""A rehearsal of a stage's step: parts that do not fit are told before a run folder exists, not at the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)


def rehearse(forward: Callable[[Tensor], object], modules: Iterable[nn.Module], shape: tuple[int, ...]) -> None:
    """Call `forward` on an input of `shape` that has no values: nothing is computed, drawn or changed.

    Args:
        forward: what a step does to its input.
        modules: in eval mode meanwhile, so that batch statistics and codebooks stay.
        shape: of the input, float32.

    Raises:
        UserError: whatever `forward` refuses.
    """
    held = [module for module in modules if module.training]
    for module in held:
        module.eval()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            forward(torch.empty(shape))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return  # a user's own part that looks at values; what is wrong with it shows at the first step
    finally:
        for module in held:
            module.train()
