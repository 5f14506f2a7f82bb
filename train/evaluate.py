"""`tokar evaluate` on as many processes as the strategy asks for."""

from __future__ import annotations

import torch

from ..conf.compose import Composed
from ..evaluate.run import evaluate


def evaluate_on_ranks(composed: Composed) -> int:
    """Measure with one process or several; lightning, which starts them and takes seconds to import, only where it must."""
    strategy = composed.typed.strategy
    if strategy.devices * strategy.nodes == 1:
        return evaluate(composed)
    from .strategy import Workers

    workers = Workers(strategy)
    workers.launch()
    torch.set_float32_matmul_precision("highest")  # as one process has it, so that samples and numbers are the same
    return evaluate(composed, workers.device)
