"""Which process is which: read off what started the processes (srun, torchrun), with words when something is missing.

Lightning's own reading of Slurm's variables is not used: it is off in jobs named bash, under salloc and beside torchrun,
takes over signals, and saves inside their handlers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from ..errors import UserError
from .hosts import default_port, expand

_NEEDED = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
_FIX = "start with `tokar slurm submit`, or with srun --nodes={nodes} --ntasks-per-node={devices} inside a job"


class SrunEnvironment(ClusterEnvironment):
    """One process for each rank, started by srun.

    Args:
        variables: of the environment.
        nodes, devices: as configured; their product is the number of ranks.

    Raises:
        UserError: a variable is missing or no number, or srun started another number of processes.
    """

    def __init__(self, variables: Mapping[str, str], nodes: int, devices: int) -> None:
        fix = _FIX.format(nodes=nodes, devices=devices)
        if missing := [name for name in _NEEDED if not variables.get(name)]:
            raise UserError(f"srun started this process, but {', '.join(missing)} is not set", where="SLURM", fix=fix)
        try:
            self._job, self._rank, self._local, self._node, tasks = (int(variables[name]) for name in _NEEDED[:5])
            hosts = expand(variables["SLURM_STEP_NODELIST"])
            self._port = int(variables.get("MASTER_PORT") or default_port(self._job))
        except ValueError as error:
            raise UserError(f"a variable of Slurm cannot be read: {error}", where="SLURM", fix=fix) from error
        if tasks != nodes * devices or len(hosts) != nodes:
            started = f"srun started {tasks} processes on {len(hosts)} nodes, the strategy has {devices} on each of {nodes}"
            raise UserError(started, where="strategy", fix=fix)
        self._world = tasks
        self._address = variables.get("MASTER_ADDR") or hosts[0]

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        """Host of rank 0: the first of the nodes."""
        return self._address

    @property
    def main_port(self) -> int:
        """The job script's choice, which it has found free; else the same for every rank of a job."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """srun started several processes."""
        return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_STEP_ID" in os.environ

    def world_size(self) -> int:
        """Number of ranks."""
        return self._world

    def set_world_size(self, size: int) -> None:
        """srun has set it."""

    def global_rank(self) -> int:
        """Among all."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """srun has set it."""

    def local_rank(self) -> int:
        """On this node."""
        return self._local

    def node_rank(self) -> int:
        """Of this node."""
        return self._node


def environment(nodes: int, devices: int) -> ClusterEnvironment | None:
    """How the ranks find one another; `None` leaves it to Lightning, which starts those of one node itself.

    Raises:
        UserError: what started this process does not fit the strategy.
    """
    if TorchElasticEnvironment.detect():
        world = int(os.environ["WORLD_SIZE"])
        if world != nodes * devices:
            raise UserError(f"torchrun started {world} processes, the strategy has {devices} on each of {nodes} nodes",
                            where="strategy", fix="set strategy.nodes and strategy.devices to torchrun's numbers")  # fmt: skip
        return TorchElasticEnvironment()
    if SrunEnvironment.detect():
        return SrunEnvironment(os.environ, nodes, devices)
    if nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
        fix = "start with `tokar slurm submit`, with torchrun on each node, or set MASTER_ADDR, MASTER_PORT and NODE_RANK there"
        raise UserError("this process was started alone", where=f"strategy.nodes={nodes}", fix=fix)
    return LightningEnvironment() if "SLURM_JOB_ID" in os.environ else None
