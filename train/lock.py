"""One process trains in a run folder; a dead one cannot hold it, on this node or on another.

On one machine an `flock` says it at once, and the kernel lets go of it when the process dies. File systems of clusters do
not all carry it from node to node, so whoever holds a folder also writes there who it is (`.owner`) and keeps its date
fresh. Another node asks Slurm whether the owner's job still runs; without Slurm it looks at the date.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from ..errors import UserError

LOCK_NAME, OWNER_NAME = ".lock", ".owner"
HEARTBEAT, STALE = 10.0, 60.0
"""Seconds between two signs of life, and seconds without one after which an owner that Slurm knows nothing of is dead."""
LIVE = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT"})
"""States of a job whose processes may still write."""


class Lock:
    """Held until it is forgotten, or the process ends.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._owner = folder, folder / OWNER_NAME
        self._file = (folder / LOCK_NAME).open("a")
        self._flock()
        self._claim()
        ended = threading.Event()
        threading.Thread(target=_beat, args=(self._owner, ended), daemon=True).start()
        weakref.finalize(self, _release, self._owner, ended)

    def _flock(self) -> None:
        """Take the lock; processes of the same job, from before it was requeued, are given time to die."""
        end = time.monotonic() + STALE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                owner = _read(self._owner)
                if owner.get("job") is None or owner["job"] != _me()["job"] or time.monotonic() > end:
                    raise self._refusal(owner) from error
            time.sleep(0.2)

    def _claim(self) -> None:
        """Put our name on the folder; the link makes it appear whole, and only where there is none."""
        mine = self.folder / f"{OWNER_NAME}.{secrets.token_hex(4)}"
        mine.write_text(json.dumps(_me()))
        try:
            for _ in range(3):
                with contextlib.suppress(FileExistsError):
                    os.link(mine, self._owner)
                    return
                other = _read(self._owner)
                if self._lives(other, mine):
                    raise self._refusal(other)
                self._take_away(other)
            raise self._refusal(_read(self._owner))
        finally:
            mine.unlink()

    def _take_away(self, dead: dict[str, Any]) -> None:
        """Remove the name of a dead owner, unless another process was quicker and has put its own there."""
        aside = self.folder / f"{OWNER_NAME}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            self._owner.rename(aside)
            if (found := _read(aside)) != dead:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._owner)
                raise self._refusal(found)
            aside.unlink()

    def _lives(self, owner: dict[str, Any], now: Path) -> bool:
        """The owner may still write here. `now` is a file just written: the file server's clock counts, not ours."""
        me = _me()
        if owner.get("host") == me["host"] and owner.get("boot") == me["boot"]:
            return False  # its flock on this machine would have been in the way
        if owner.get("job") is not None:
            if owner["job"] == me["job"]:
                return False  # this job, before it was requeued
            state = job_state(owner["job"])
            if state is not None:
                return state in LIVE
        with contextlib.suppress(OSError):
            return now.stat().st_mtime - self._owner.stat().st_mtime < STALE
        return False

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        who = f"job {owner['job']}" if owner.get("job") else f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        stop = f"stop it (tokar slurm stop {self.folder})" if owner.get("job") else "stop it"
        who = who if owner else "another process"
        return UserError(f"{who} trains in this run folder", where=self.folder, fix=f"wait for it, {stop}, or set name=…")


def _beat(owner: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(owner)


def _release(owner: Path, ended: threading.Event) -> None:
    ended.set()
    if _read(owner) == _me():
        owner.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "job": os.environ.get("SLURM_JOB_ID"), "pid": os.getpid(), "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """Who a file names; nobody when it is gone or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def job_state(job: str) -> str | None:
    """State of a Slurm job, e.g. `RUNNING`; `GONE` when Slurm no longer knows it, `None` when Slurm cannot be asked."""
    command = ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode == 0:
        return asked.stdout.split()[0] if asked.stdout.split() else "GONE"
    return "GONE" if "Invalid job id" in asked.stderr else None
