"""The sweep folder: what is tried, a record and a lock for each point. Whoever wants to know anything reads it here.

```
runs/sweeps/NAME/
  sweep.json         what was asked for: stage, overrides, settings
  points/0003.json   a point: its overrides, its run folder, what became of it; whole or not there
  locks/0003         held by the processes of the point while it runs; a dead process holds none
  logs/0003.log      what its process printed
```
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ..conf.slurm import Cluster
from ..conf.sweeps import Sweep as Settings
from ..data.files import make_folder, read_json, write_json
from ..errors import UserError

FORMAT = 1
PLAN_NAME = "sweep.json"
WAITING, RUNNING, INTERRUPTED, FINISHED, PRUNED, FAILED = "waiting", "running", "interrupted", "finished", "pruned", "failed"
STATES = (FINISHED, PRUNED, RUNNING, INTERRUPTED, WAITING, FAILED)
TAIL = 10
"""Last lines of its output that a failed point keeps."""
MEND = "restore it, or remove the sweep folder; the runs of its points stay"
PATIENCE = 0.2
"""Seconds a lock is asked for: one who only looks whether it is held holds it for a moment."""


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    Args:
        stage: of `tokar train`.
        fixed: overrides that all points share.
        space: overrides with several values, as written.
        settings: of the sweep.
        cluster: what the job of each point asks for; `None`: points run here.
        direction: of the metric, `minimize` or `maximize`.
        format: version of the folder.
    """

    stage: str
    fixed: tuple[str, ...]
    space: tuple[str, ...]
    settings: Settings
    direction: str
    cluster: Cluster | None = None
    format: int = FORMAT

    def better(self, one: float, other: float) -> bool:
        """`one` is the better value of the metric."""
        return one < other if self.direction == "minimize" else one > other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        cluster = self.cluster.model_dump() if self.cluster else None
        return {**vars(self), "settings": self.settings.model_dump(), "cluster": cluster}


@dataclass(frozen=True)
class Point:
    """One point and what became of it.

    Args:
        number: from 0.
        overrides: the values that it has and others have not.
        run: its run folder, seen from the sweep folder.
        state: as last written; `running` with nobody holding the lock means interrupted.
        tries: how often it failed.
        starts: how often it was started.
        reason: why it failed.
        tail: the last lines of its output when it failed.
        trial: number in Optuna's study.
        holder: who ran it last: host, process, and job where there is one.
        changed: seconds since 1970.
    """

    number: int
    overrides: tuple[str, ...]
    run: str
    state: str = WAITING
    tries: int = 0
    starts: int = 0
    reason: str = ""
    tail: tuple[str, ...] = ()
    trial: int | None = None
    holder: dict[str, Any] = field(default_factory=dict)
    changed: float = 0.0

    @property
    def ended(self) -> bool:
        """It is not started again, whatever the number of tries."""
        return self.state in (FINISHED, PRUNED)

    @property
    def words(self) -> str:
        """Its values as one text."""
        return " ".join(self.overrides)


class SweepFolder:
    """A sweep on disk.

    Raises:
        UserError: there is none, or another version made it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / PLAN_NAME).is_file():
            raise UserError("no sweep here", where=path, fix="give the folder that `tokar sweep STAGE …` named")
        self.plan = _read_plan(path / PLAN_NAME)

    @classmethod
    def create(cls, path: Path, plan: Plan) -> SweepFolder:
        """Write the plan, over that of an earlier start.

        Raises:
            UserError: the folder cannot be written.
        """
        for name in ("points", "locks", "logs"):
            make_folder(path / name)
        write_json(path / PLAN_NAME, plan.to_dict())
        return cls(path)

    def points(self) -> list[Point]:
        """All points as they are now, by number."""
        return [self._seen(_read_point(file)) for file in sorted((self.path / "points").glob("[0-9]*.json"))]

    def point(self, number: int) -> Point | None:
        """A point as it was last written; `None` when there is none of this number yet."""
        file = self._place(number)
        return _read_point(file) if file.exists() else None

    def run(self, point: Point) -> Path:
        """The run folder of a point."""
        return Path(os.path.normpath(self.path / point.run))

    def log(self, point: Point) -> Path:
        """What the processes of a point printed."""
        return self.path / "logs" / f"{point.number:04d}.log"

    def write(self, point: Point, **changes: Any) -> Point:
        """Write a changed point; only for whoever holds its lock or makes it."""
        point = replace(point, **changes, changed=time.time())
        write_json(self._place(point.number), asdict(point))
        return point

    def may_start(self, point: Point) -> bool:
        """It has not ended and is not out of tries; somebody may be running it."""
        return not point.ended and (point.state != FAILED or point.tries <= self.plan.settings.retries)

    def claim(self, number: int) -> Claim | None:
        """Take a point to run it; `None`: somebody runs it, or it needs no run. Two callers never get the same point."""
        lock = _lock(self._lock_place(number), fcntl.LOCK_EX, PATIENCE)
        if lock is None:
            return None
        point = self.point(number)
        if point is None or not self.may_start(point):
            lock.close()
            return None
        return Claim(point, lock)

    def _seen(self, point: Point) -> Point:
        """A point that stands as running is interrupted when nobody holds its lock."""
        if point.state == RUNNING and (lock := _lock(self._lock_place(point.number), fcntl.LOCK_SH)):
            lock.close()
            again = self.point(point.number) or point  # it may have ended between the two looks
            return replace(again, state=INTERRUPTED) if again.state == RUNNING else again
        return point

    def _place(self, number: int) -> Path:
        return self.path / "points" / f"{number:04d}.json"

    def _lock_place(self, number: int) -> Path:
        return self.path / "locks" / f"{number:04d}"


@dataclass
class Claim:
    """A point that this process, and children that inherit the lock, may run."""

    point: Point
    lock: IO[str]

    def release(self) -> None:
        """Give it back; children that still live keep it."""
        self.lock.close()


def _lock(place: Path, kind: int, patience: float = 0.0) -> IO[str] | None:
    """An open file with a lock on it; `None` when another process has it. Processes forked from here hold it too."""
    end = time.monotonic() + patience
    file = place.open("a")
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                return None
            time.sleep(0.02)


def _read_plan(file: Path) -> Plan:
    try:
        plain = read_json(file, MEND)
        if plain.get("format") != FORMAT:
            raise UserError(f"format {plain.get('format')}, not {FORMAT}", where=file, fix="use the version that made it")
        settings = Settings.model_validate(plain["settings"])
        cluster = Cluster.model_validate(plain["cluster"]) if plain["cluster"] else None
        return Plan(**{**plain, **_tuples(plain, "fixed", "space"), "settings": settings, "cluster": cluster})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError("damaged", where=file, fix=MEND) from error


def _read_point(file: Path) -> Point:
    try:
        plain = read_json(file, MEND)
        return Point(**{**plain, **_tuples(plain, "overrides", "tail")})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError("damaged", where=file, fix=MEND) from error


def _tuples(plain: dict[str, Any], *names: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(plain[name]) for name in names}


def counts(points: Sequence[Point]) -> str:
    """How many points there are in each state, in words."""
    found = {state: sum(point.state == state for point in points) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in found.items() if count) or "no points"
