"""The schema of `tokar slurm`: what a job asks the cluster for, and chains of jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..ranges import NonNegativeInt, PositiveInt
from .nodes import Node, Text
from .spine import Paths


class Cluster(Node):
    """What a job asks the cluster for, and how its processes start."""

    nodes: PositiveInt = Field(description="machines; sets strategy.nodes")
    gpus_per_node: NonNegativeInt = Field(description="0: the job asks for none")
    gpu_type: Text | None = Field(None, description="as the site calls it, e.g. h100; null: any")
    tasks_per_node: PositiveInt | None = Field(
        None, description="processes on each node, sets strategy.devices; null: one for each GPU"
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="cores of each process, its loaders included; null: as the site says"
    )
    memory: Text | None = Field(None, description="of each node, e.g. 200G, or 0 for all of it; null: the site's default")
    partition: Text | None = Field(None, description="null: the site's default")
    account: Text | None = Field(None, description="who pays; null: your default")
    qos: Text | None = Field(None, description="quality of service; null: your default")
    constraint: Text | None = Field(None, description="features that the nodes must have, e.g. ib")
    reservation: Text | None = Field(None, description="nodes kept for you")
    time: Text | None = Field(None, description="limit of one start: 30, 24:00:00, 2-00; a longer run is requeued")
    signal_before: PositiveInt = Field(120, description="seconds before the limit at which the run is told to save and requeue")
    max_crashes: NonNegativeInt = Field(3, description="starts again after so many crashes; a stop by a signal is none")
    launcher: Literal["srun", "torchrun"] = Field("srun", description="srun starts every process, or one torchrun on each node")
    container: Text | None = Field(None, description="image for srun's --container-image (pyxis); null: none")
    container_mounts: list[Text] = Field([], description="FROM:TO besides the working directory and the snapshot of the code")
    modules: list[Text] = Field([], description="loaded before the start: module load …")
    setup: list[Text] = Field([], description="lines of shell before the start")
    environment: dict[str, Any] = Field({}, description="variables of all processes, e.g. NCCL's")
    python: Text | None = Field(None, description="interpreter of the job; null: the one that submits")
    sbatch: list[Text] = Field([], description="further options of sbatch, e.g. --exclusive")
    srun: list[Text] = Field([], description="further options of srun, e.g. --cpu-bind=cores")

    @property
    def tasks(self) -> int:
        """Ranks on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


class Step(Node):
    """One job of a pipeline: tasks that run one after another on the same nodes."""

    name: Text = Field(description="of the job")
    tasks: Annotated[dict[str, Text], Field(min_length=1)] = Field(
        description="by name: a stage and its overrides, or report and runs; {NAME} is the folder of an earlier task"
    )
    cluster: dict[str, Any] = Field({}, description="keys of the cluster that differ for this job")


class Pipeline(Node):
    """Jobs that wait for one another; the next begins when the one before ended well."""

    steps: Annotated[list[Step], Field(min_length=1)] = Field(description="in order")


class Slurm(Node):
    """`tokar slurm`."""

    stage: Literal["slurm"]
    paths: Paths
    cluster: Cluster
    pipeline: Pipeline | None = Field(None, description="chain of jobs, for `tokar slurm pipeline`")
