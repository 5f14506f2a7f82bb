"""Which process is which: read off what started the processes (srun, torchrun, rank 0), with words when something is missing.

Lightning's own reading of Slurm's variables is not used: it is off in jobs named bash, under salloc and beside torchrun,
takes over signals, and saves inside their handlers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError
from .hosts import default_port, expand

_NEEDED = {
    "SLURM": ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
PARENT = "TOKAR_PARENT"
"""Environment variable with the process that starts the other ranks of this machine itself."""
_FIX = "start with `tokar slurm submit`, or with srun --nodes={nodes} --ntasks-per-node={devices} inside a job"


@dataclass(frozen=True)
class Place:
    """One rank among those that have been started.

    Args:
        rank, local_rank: among all, and on this node.
        world: number of ranks.
        address, port: where rank 0 is met.
        parent: process without which this one must not go on; `None`: srun sees to it.
    """

    rank: int
    local_rank: int
    world: int
    address: str
    port: int
    parent: int | None


def by_srun(variables: Mapping[str, str], nodes: int, devices: int) -> Place:
    """The place of a process that srun started; it starts one for each rank.

    Args:
        variables: of the environment.
        nodes, devices: as configured; their product is the number of ranks.

    Raises:
        UserError: a variable is missing or no number, or srun started another number of processes.
    """
    fix = _FIX.format(nodes=nodes, devices=devices)
    _require("SLURM", "srun", variables, fix)
    try:
        job, rank, local, tasks = (int(variables[name]) for name in _NEEDED["SLURM"][:4])
        hosts = expand(variables["SLURM_STEP_NODELIST"])
        port = int(variables.get("MASTER_PORT") or default_port(job))  # the job script's choice, which it has found free
    except ValueError as error:
        raise UserError(f"a variable of Slurm cannot be read: {error}", where="SLURM", fix=fix) from error
    if tasks != nodes * devices or len(hosts) != nodes:
        started = f"srun started {tasks} processes on {len(hosts)} nodes, the strategy has {devices} on each of {nodes}"
        raise UserError(started, where="strategy", fix=fix)
    return Place(rank, local, tasks, variables.get("MASTER_ADDR") or hosts[0], port, parent=None)


def by_torchrun(variables: Mapping[str, str], nodes: int, devices: int) -> Place:
    """The place of a process that torchrun started.

    Args:
        variables: of the environment.
        nodes, devices: as configured; their product is the number of ranks.

    Raises:
        UserError: a variable is missing, or torchrun started another number of processes.
    """
    world = int(variables.get("WORLD_SIZE") or 0)
    if world != nodes * devices:
        raise UserError(f"torchrun started {world} processes, the strategy has {devices} on each of {nodes} nodes",
                        where="strategy", fix="set strategy.nodes and strategy.devices to torchrun's numbers")  # fmt: skip
    _require("torchrun", "torchrun", variables, "start with torchrun or with `tokar train`, not with variables set by hand")
    rank, local, port = (int(variables[name]) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    return Place(rank, local, world, variables["MASTER_ADDR"], port, parent=os.getppid())


def by_first(variables: Mapping[str, str], nodes: int, devices: int) -> Place:
    """The place of a process that the first one of its machine started, through Lightning, which sets these variables.

    Args:
        variables: of the environment.
        nodes, devices: as configured; their product is the number of ranks.
    """
    local, node, port = (int(variables[name]) for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT"))
    return Place(node * devices + local, local, nodes * devices, variables["MASTER_ADDR"], port, int(variables[PARENT]))


def _require(where: str, launcher: str, variables: Mapping[str, str], fix: str) -> None:
    if missing := [name for name in _NEEDED[where] if not variables.get(name)]:
        raise UserError(f"{launcher} started this process, but {', '.join(missing)} is not set", where=where, fix=fix)


def place(nodes: int, devices: int) -> Place | None:
    """This process's place among the ranks; `None` for one that has to start the others of its machine.

    Raises:
        UserError: what started this process does not fit the strategy.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return by_torchrun(os.environ, nodes, devices)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_STEP_ID" in os.environ:
        return by_srun(os.environ, nodes, devices)
    if PARENT in os.environ and int(os.environ.get("LOCAL_RANK") or 0) > 0:
        return by_first(os.environ, nodes, devices)
    if nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
        fix = "start with `tokar slurm submit`, with torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there"
        raise UserError("this process was started alone", where=f"strategy.nodes={nodes}", fix=fix)
    return None
