"""One torchrun on each node: `python -m tokar.slurm.node RANKS STAGE KEY=VALUE…`, started by srun.

torchrun ends its ranks within 30 seconds of a signal, or dies of it without them. Here it never sees one: it runs in a
session of its own with SIGUSR1 ignored, and what Slurm sends is passed on to the ranks, which save and end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ..errors import EXIT_USER_ERROR
from ..train.hosts import expand
from ..train.signals import EXIT_REQUEUE
from .rank import ENDED, note

_NEEDED = ("SLURM_NNODES", "SLURM_NODEID", "MASTER_PORT")


def command(ranks: str, words: Sequence[str]) -> list[str]:
    """torchrun's command on this node, with a fixed meeting point: Slurm has already said who is who."""
    address = expand(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])[0]
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={os.environ['SLURM_NNODES']}", f"--nproc-per-node={ranks}",
        f"--node-rank={os.environ['SLURM_NODEID']}", f"--master-addr={os.environ.get('MASTER_ADDR') or address}",
        f"--master-port={os.environ['MASTER_PORT']}", "-m", "tokar.slurm.rank", *words,
    ]  # fmt: skip


def main(words: Sequence[str]) -> int:
    """Run torchrun to its end; returns its exit code, 0 when the ranks were stopped and have saved."""
    if missing := [name for name in _NEEDED if name not in os.environ]:
        sys.stderr.write(f"tokar: {', '.join(missing)} is not set; start with `tokar slurm submit`\n")
        return EXIT_USER_ERROR
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # until there are ranks to pass it on to; torchrun inherits it
    agent = subprocess.Popen(command(words[0], words[1:]), start_new_session=True)
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in _children(agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGUSR1)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = agent.wait()
    if code and asked and not Path(os.environ.get(ENDED, "")).is_file():
        note(EXIT_REQUEUE)
    return code


def _children(parent: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{parent}/task").glob("*/children") for child in file.read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
