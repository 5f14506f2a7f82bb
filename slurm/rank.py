"""What srun and torchrun start on every rank: `python -m tokar.slurm.rank STAGE KEY=VALUE…`.

Signals are taken over before the slow imports. A rank that saved after one ends with 0, so that srun does not kill those
that are still ending; how the first rank ended otherwise than well is written for the job script, because srun's own
exit code is that of whichever rank it killed.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import told_in_lines
from ..train.signals import EXIT_REQUEUE, StopFlag

ENDED = "TOKAR_ENDED"
"""Variable that names the file for the exit code."""
ONCE = frozenset({"evaluate", "sample", "report"})
"""What runs in one process, on however many nodes."""
SHARDS = {"encode": ("..train.encode", "encode"), "pairs": ("..train.pairs", "make_pairs")}
"""What writes shards on all ranks, by its module and function, imported when it is known which of them is wanted."""


def main(words: Sequence[str]) -> int:
    """Run a stage; returns 0 also when it was stopped and has saved."""
    stop = StopFlag()
    stop.install()
    code = 1
    try:
        code = told_in_lines(lambda: run(words[0], words[1:], stop))
    finally:
        if code:
            note(code)
    return 0 if code == EXIT_REQUEUE else code


def note(code: int) -> None:
    """Write down how this rank ended; the first one counts."""
    place = os.environ.get(ENDED)
    if not place:
        return
    try:
        with Path(place).open("x") as file:
            file.write(f"{code}\n")
    except FileExistsError:
        return
    except OSError as error:  # the job script then goes by srun's exit code
        sys.stderr.write(f"tokar: {place}: {error.strerror}\n")


def run(stage: str, overrides: Sequence[str], stop: StopFlag) -> int:
    """Run a stage of `tokar slurm submit`; returns the exit code."""
    if stage == "report":
        return _report(overrides)
    from ..conf.compose import TRAINING, compose

    composed = compose(stage, overrides)
    if stage in TRAINING:
        from ..train.run import start

        return start(composed, stop)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if stage in SHARDS:
        module, name = SHARDS[stage]
        write = getattr(importlib.import_module(module, __package__), name)
        signal.signal(signal.SIGUSR1, _leave)  # finished shards are kept: the next start goes on after them
        signal.signal(signal.SIGTERM, _leave)
        return int(write(composed))
    if stage == "sample":
        from ..train.sample import sample

        return sample(composed)
    from ..evaluate.run import evaluate

    return evaluate(composed)


def _leave(number: int, frame: object) -> None:
    note(EXIT_REQUEUE)
    os._exit(0)


def _report(words: Sequence[str]) -> int:
    from ..evaluate.report.page import write_report

    *runs, out = words
    sys.stdout.write(f"{write_report([Path(run) for run in runs], Path(out))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
