"""What `tokar` can do: a table of commands, a module for each group of them.

Each command imports what it runs only when it runs: help and config errors are quick.
"""

from __future__ import annotations

from . import cluster, config, data, results, sweeps, tools, training, weights
from .command import Command

GROUPS: dict[str, tuple[Command, ...]] = {
    "Data": data.COMMANDS,
    "Training (the same command again goes on where it stopped)": training.COMMANDS,
    "Sweeps (the same command again starts what is missing)": sweeps.COMMANDS,
    "From what was trained": results.COMMANDS,
    "On a Slurm cluster (read on: slurm/README.md)": cluster.COMMANDS,
    "Config": config.COMMANDS,
    "Weights": weights.COMMANDS,
    "Tools": tools.COMMANDS,
}
COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)
"""In the order of the help."""
