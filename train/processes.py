"""Who starts the processes of a run: nobody when there is one, Lightning's Fabric when there are more.

Nothing else of Fabric is used. Its import takes longer than those of torch, data and networks together, since it brings
torchmetrics and torch's compiler along; a run in one process does without.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from ..conf.spine import Strategy

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Alone:
    """One process, with what is used of `Fabric`."""

    device: torch.device
    global_rank, local_rank, world_size, strategy = 0, 0, 1, None

    def launch(self) -> None:
        """There is nobody to start."""

    def barrier(self) -> None:
        """There is nobody to wait for."""


def processes(config: Strategy, device: torch.device) -> Alone | Fabric:
    """What starts the other processes of a run, or finds those that a launcher has started.

    Args:
        config: the strategy.
        device: where a single process computes.

    Raises:
        UserError: what started this process does not fit the strategy.
    """
    if config.name == "single" and _launched() == 1:
        return Alone(device)
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from .rendezvous import environment

    backend = None if config.backend == "auto" else config.backend
    return Fabric(
        plugins=environment(config.nodes, config.devices),
        accelerator=config.accelerator,
        strategy=DDPStrategy(process_group_backend=backend, timeout=timedelta(seconds=config.timeout)),
        devices=config.devices,
        num_nodes=config.nodes,
    )


def _launched() -> int:
    """How many processes torchrun or srun has started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) if "SLURM_STEP_ID" in os.environ else 1
