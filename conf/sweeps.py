"""The schema of `tokar sweep`: what is tried, how it is judged, where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..ranges import NonNegativeInt, PositiveInt
from .nodes import Node, Text
from .slurm import Cluster


class Pruning(Node):
    """When a point that does badly is stopped, by the values of the metric that it has logged so far."""

    kind: Literal["median", "halving"] = Field(
        "median", description="stop what is worse than the median at its step, or is not of the best quarter"
    )
    trials: NonNegativeInt = Field(5, description="points that end before any is stopped")
    warmup: NonNegativeInt = Field(0, description="steps of each point in which it is left alone")


class Sweep(Node):
    """Points, how they are judged, where they run."""

    method: Literal["grid", "random", "tpe"] = Field(description="how points are made; tpe is Optuna's")
    metric: str = Field("val/loss", description="key of metrics.jsonl")
    direction: Literal["minimize", "maximize"] | None = Field(None, description="null: what the metric's name says")
    value: Literal["last", "best"] = Field("last", description="of the metric over a run")
    count: PositiveInt | None = Field(None, description="points of random and tpe; more of them may be asked for later")
    seed: NonNegativeInt = Field(0, description="of the points that are drawn")
    retries: NonNegativeInt = Field(1, description="how often a point that failed is tried again, over all starts")
    backend: Literal["local", "slurm"] = Field("local", description="processes here, or an array of jobs")
    parallel: PositiveInt = Field(1, description="points at once")
    name: Text | None = Field(None, description="folder below paths.runs/sweeps; null derives it from what is tried")
    pruning: Pruning | None = Field(None, description="method=tpe: stop points that do badly")


class SweepCommand(Node):
    """`tokar sweep`."""

    stage: Literal["sweep"]
    sweep: Sweep
    cluster: Cluster | None = Field(None, description="backend=slurm: what the job of each point asks for")
