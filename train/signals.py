"""Signals ask a run to stop; the run stops at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; starting the same command again goes on."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for Ctrl-C."""
EXIT_LOST = 69
"""EX_UNAVAILABLE of sysexits.h: another rank was killed, or the process that started this one. The last checkpoint is whole:
starting the same command again goes on, unless it is killed again for the same reason (as for want of memory)."""
EXIT_HUNG = 124
"""What timeout(1) reports: no step for `guard.hang_after` seconds. The same command goes on from the last checkpoint; on
another machine where the hang was a machine's fault. RUN/hang tells where each rank stood."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT. The handler does nothing else; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def install(self) -> None:
        """Take over the three signals; only from the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Stopped(Exception):  # noqa: N818 - not an error: the run did what it was asked
    """The run was asked to stop and has saved. `exit_code` tells the caller whether to start it again."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, saved; the same command goes on from here")
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE
