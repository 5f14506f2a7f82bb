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
ONCE = frozenset({"sample", "report"})
"""What runs in one process, on however many nodes."""
ACTIONS = {
    "encode": ("..train.encode", "encode"), "pairs": ("..train.pairs", "make_pairs"), "sample": ("..train.sample", "sample"),
    "evaluate": ("..train.evaluate", "evaluate_on_ranks"),
}  # fmt: skip
"""What trains nothing, by its module and function, imported when it is known which of them is wanted."""


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
    module, name = ACTIONS[stage]
    act = getattr(importlib.import_module(module, __package__), name)
    # Finished shards and states of an evaluation are kept: the next start goes on after them.
    goes_on = composed.typed.dealt if stage == "evaluate" else stage not in ONCE
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _leave if goes_on else signal.SIG_DFL)
    return int(act(composed))


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
