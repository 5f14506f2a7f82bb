"""A job, and the script that is submitted for it: `job.sbatch` with its placeholders filled in."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.compose import Composed
from ..conf.slurm import Cluster
from ..train.hosts import FIRST_PORT, PORTS

TEMPLATE = Path(__file__).with_name("job.sbatch")


@dataclass(frozen=True)
class Task:
    """A checked task of a job.

    Args:
        words: for `tokar.slurm.rank`.
        folder: what it makes: the run folder, the codes, or for evaluations the folder of the job.
        composed: its config; `None` for a report.
        once: it runs in one process, on however many nodes.
    """

    words: tuple[str, ...]
    folder: Path
    composed: Composed | None = None
    once: bool = False


@dataclass(frozen=True)
class Job:
    """What one job runs.

    Args:
        name: as the queue shows it.
        state: folder of its script, log, code and counters.
        tasks: run one after another.
        cluster: what it asks for.
        command: that wrote it.
    """

    name: str
    state: Path
    tasks: Sequence[Task]
    cluster: Cluster
    command: Sequence[str]

    @property
    def script(self) -> Path:
        """Where the script is written."""
        return self.state / "job.sbatch"


def render(job: Job, code: Path, here: Path) -> str:
    """The script of a job; the arguments are those of `values_of`."""
    return fill(TEMPLATE.read_text(), values_of(job, code, here))


def values_of(job: Job, code: Path, here: Path) -> dict[str, Any]:
    """What the placeholders of a template stand for.

    Args:
        job: what it runs.
        code: snapshot of the package.
        here: working directory of the job, where relative paths begin.
    """
    cluster = job.cluster
    torchrun = cluster.launcher == "torchrun"
    cores = cluster.cpus_per_task
    if torchrun and cores:
        cores *= cluster.tasks
    # srun does not take the number of cores from sbatch
    common = [*([f"--cpus-per-task={cores}"] if cores else []), *_container(job, here), *cluster.srun]
    return {
        **cluster.model_dump(),
        "title": f"{job.name}: {', '.join(task.words[0] for task in job.tasks)}",
        "command": shlex.join(["tokar", *job.command]),
        "script": shlex.quote(str(job.script)),
        "name": shlex.quote(job.name),
        "tasks_per_node": 1 if torchrun else cluster.tasks,
        "cpus_per_task": cores,
        "gpus": _gpus(cluster),
        "here": shlex.quote(str(here)),
        "state": shlex.quote(str(job.state)),
        "code": shlex.quote(str(code)),
        "python": shlex.quote(cluster.python or sys.executable),
        "variable": [f"{name}={shlex.quote(str(value))}" for name, value in cluster.environment.items()],
        "module": [shlex.quote(module) for module in cluster.modules],
        "first_port": FIRST_PORT,
        "ports": PORTS,
        "srun": shlex.join(["--kill-on-bad-exit=1", *common]),
        "srun_once": shlex.join(["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *common]),
        "run": [_run(task, cluster) for task in job.tasks],
    }  # fmt: skip


def _gpus(cluster: Cluster) -> str | None:
    """`h100:8`, `8`, or nothing."""
    if not cluster.gpus_per_node:
        return None
    return f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put values in place of `{{name}}`. A line with a list stands once for each item, one with nothing not at all."""
    lines: list[str] = []
    for line in template.splitlines():
        names = re.findall(r"\{\{(\w+)\}\}", line)
        listed = next((name for name in names if isinstance(values[name], list)), None)
        for item in values[listed] if listed else [None]:
            own = {name: item if name == listed else values[name] for name in names}
            if all(value is not None and value != "" for value in own.values()):
                lines.append(re.sub(r"\{\{(\w+)\}\}", lambda found, own=own: str(own[found[1]]), line))  # type: ignore[misc]
    return "\n".join(lines) + "\n"


def _container(job: Job, here: Path) -> list[str]:
    if not job.cluster.container:
        return []
    mounts = [f"{place}:{place}" for place in dict.fromkeys((here, job.state.parent))]
    return [f"--container-image={job.cluster.container}", f"--container-workdir={here}",
            f"--container-mounts={','.join([*mounts, *job.cluster.container_mounts])}"]  # fmt: skip


def _run(task: Task, cluster: Cluster) -> str:
    """One task as the script calls it: `ranks "$python" -m tokar.slurm.rank …`."""
    if task.once:
        return f'once "$python" -m tokar.slurm.rank {shlex.join(task.words)}'
    start = f"tokar.slurm.node {cluster.tasks}" if cluster.launcher == "torchrun" else "tokar.slurm.rank"
    return f'ranks "$python" -m {start} {shlex.join(task.words)}'
