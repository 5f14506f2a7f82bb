"""Names and ports of a job's nodes, read off Slurm's variables. `scontrol` would say them too, but not in a container."""

from __future__ import annotations

import re

FIRST_PORT, PORTS = 12000, 20000
"""Where a job's port lies: below the ports that systems hand out by themselves (from 32768)."""


def default_port(job: int) -> int:
    """A port that is the same for every process of a job, and another for the next jobs."""
    return FIRST_PORT + job % PORTS


def expand(nodelist: str) -> list[str]:
    """Host names of Slurm's short form: `gpu[08-10,12],login` → `gpu08 gpu09 gpu10 gpu12 login`.

    Raises:
        ValueError: it cannot be read.
    """
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist):
        found = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            found = [head + tail for head in found for tail in ([text] if text else _numbers(numbers))]
        hosts += found
    if not hosts or nodelist.count("[") != nodelist.count("]"):
        raise ValueError(f"no list of nodes: {nodelist!r}")
    return hosts


def _numbers(text: str) -> list[str]:
    """`08-10,12` → `08 09 10 12`."""
    found: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return found
