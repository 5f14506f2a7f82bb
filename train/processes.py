"""Who starts the processes of a run: nobody when there is one, srun or torchrun, else Lightning's Fabric.

Nothing else of Fabric is used. Its import takes longer than those of torch, data and networks together, since it brings
torchmetrics and torch's compiler along; a run in one process does without, and so does every rank that others have started.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..conf.spine import Strategy
from ..errors import UserError
from .rendezvous import Place, place

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


class Joined:
    """A rank that srun, torchrun or rank 0 has started, with what is used of `Fabric`, and does as Fabric does there.

    Args:
        config: the strategy.
        device: kind of device.
        found: which rank this is.

    Raises:
        UserError: this process sees fewer GPUs than the strategy has ranks on a node.
    """

    strategy = None

    def __init__(self, config: Strategy, device: torch.device, found: Place) -> None:
        self.config, self.place, self.device = config, found, device
        self.global_rank, self.local_rank, self.world_size = found.rank, found.local_rank, found.world
        if device.type == "cuda":
            if (seen := torch.cuda.device_count()) < config.devices:
                what = f"this process sees {seen} GPUs, the strategy has {config.devices} ranks on each node"
                raise UserError(what, where="strategy.devices", fix=f"set it to {seen}, or let each rank see all GPUs")
            self.device = torch.device("cuda", found.local_rank)

    def launch(self) -> None:
        """Meet the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "OMP_NUM_THREADS" not in os.environ:
            threads = self.config.threads or max(1, len(os.sched_getaffinity(0)) // self.config.devices)
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)
        backend = self.config.backend
        if backend == "auto":
            backend = "nccl" if self.device.type == "cuda" else "gloo"
        os.environ |= {"MASTER_ADDR": self.place.address, "MASTER_PORT": str(self.place.port)}
        dist.init_process_group(
            backend, rank=self.global_rank, world_size=self.world_size, timeout=timedelta(seconds=self.config.timeout),
            device_id=self.device if self.device.type == "cuda" else None,
        )  # fmt: skip
        if backend == "nccl":  # which warns of groups that outlive their process
            atexit.register(_leave)
        if self.global_rank == 0:
            sys.stderr.write(f"{self.world_size} ranks have met over {backend}\n")

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(device_ids=[self.local_rank] if dist.get_backend() == "nccl" else None)


def _leave() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half a group
    if dist.is_initialized():
        dist.destroy_process_group()


def processes(config: Strategy, device: torch.device) -> Alone | Joined | Fabric:
    """What starts the other processes of a run, or finds those that a launcher has started.

    Args:
        config: the strategy.
        device: where a single process computes.

    Raises:
        UserError: what started this process does not fit the strategy.
    """
    if config.name == "single" and _launched() == 1:
        return Alone(device)
    if (found := place(config.nodes, config.devices)) is not None:
        return Joined(config, device, found)
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy

    backend = None if config.backend == "auto" else config.backend
    return Fabric(
        plugins=LightningEnvironment() if "SLURM_JOB_ID" in os.environ else None,  # where Lightning would take srun's part
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
