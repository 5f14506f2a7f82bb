"""Commands in processes of their own, forked from one that has imported everything once."""

import multiprocessing.context
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PRELOAD = [
    "tokar.train.run", "tokar.train.encode", "tokar.cli", "tokar.slurm.rank", "torch._dynamo", "deepspeed", "transformers",
    "sklearn.datasets", "matplotlib.pyplot",
]  # fmt: skip
"""What the one process imports for all; whichever fixture starts it first decides."""


def _main(arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["tokar", *arguments]
    from tokar.cli import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code or 0)


class Command:
    """A tokar command in a process of its own, forked from one that has the imports: a start costs little."""

    def __init__(
        self,
        server: multiprocessing.context.ForkServerContext,
        arguments: list[str],
        log: Path,
        folder: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        self.process = server.Process(target=_main, args=(arguments, str(log), str(folder), environment or {}))
        self.process.start()

    def kill(self) -> None:
        """SIGKILL: nothing can be cleaned up."""
        assert self.process.pid is not None
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, timeout: float = 300) -> int:
        """Exit code; fails with the output when it takes too long."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            pytest.fail(f"no end after {timeout} s:\n{self.log.read_text()}")
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill_when(self, condition: Callable[[], bool], moments: random.Random, within: float = 0.1) -> bool:
        """SIGKILL up to `within` seconds after `condition` holds; false when the process ended before."""
        while self.process.is_alive():
            if condition():
                time.sleep(moments.choice([0.0, moments.uniform(0.0, within)]))
                alive = self.process.is_alive()
                self.kill()
                return alive
        return False


class Ranks:
    """The processes of one run, as torchrun would start them."""

    def __init__(self, launch: Callable[[dict[str, str]], Command], world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self.commands = [launch({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]

    def wait(self) -> list[int]:
        """Exit codes by rank."""
        return [command.wait() for command in self.commands]

    def kill(self) -> None:
        """SIGKILL for all."""
        for command in self.commands:
            command.kill()

    @property
    def output(self) -> str:
        """What they said."""
        return "".join(command.log.read_text() for command in self.commands)
