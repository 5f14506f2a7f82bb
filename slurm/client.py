"""Slurm's commands, and what they refuse in one line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

_FIXES = (
    ("partition", "set cluster.partition to one that `sinfo` lists"),
    ("account", "set cluster.account to one that `sacctmgr show associations` lists for you"),
    ("qos", "set cluster.qos to one that you may use"),
    ("node configuration|feature|Node count", "ask for what the nodes have: sinfo -o '%P %D %c %m %G %f'"),
    ("time", "set cluster.time within the partition's limit (`sinfo -o '%P %l'`)"),
    ("Unable to contact|connect failure", "wait until the controller answers (`scontrol ping`)"),
    ("Invalid job id", "the job has left Slurm's memory; submit it again with sbatch and its job.sbatch"),
)  # fmt: skip


def call(*command: str, folder: Path | None = None) -> str:
    """Standard output of a command of Slurm.

    Raises:
        UserError: it is not there, or it refused.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("no such command here", where=command[0], fix="run this on a login node of a Slurm cluster") from error
    if done.returncode:
        raise refusal(command[0], done.stderr or done.stdout)
    return done.stdout


def refusal(command: str, said: str) -> UserError:
    """What Slurm refused, with what to do about it."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in said.splitlines() if line.strip()]
    what = "; ".join(dict.fromkeys(line.rstrip(".") for line in lines)) or "it failed without a word"
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, what, re.IGNORECASE)), "see `man sbatch`")
    return UserError(what, where=command, fix=fix)


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; returns the job id."""
    return call("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


def queued(jobs: Sequence[str]) -> dict[str, dict[str, str]]:
    """What Slurm remembers of jobs, by id: `state`, `reason`, `restarts`, `nodes`, `left`; those it forgot are missing."""
    known = {}
    for job in jobs:
        try:
            said = call("scontrol", "-o", "show", "job", job)
        except UserError as error:
            if "Invalid job id" not in error.what:
                raise
            continue
        found = dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|\n|$)", said.splitlines()[0]))
        names = {"state": "JobState", "reason": "Reason", "restarts": "Restarts", "nodes": "NodeList", "since": "StartTime"}
        known[job] = {ours: found.get(theirs, "") for ours, theirs in names.items()}
    return known
