"""How long preparation still takes: a caller's function, a bar on a console, or silence in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]


@contextmanager
def progress_bar(report: Report | None, total: int, title: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of newly finished items.

    Args:
        report: called with (done, total) instead of drawing a bar.
        total: items in all.
        title: in front of the bar.
    """
    if report is not None:
        yield _counting(report, total)
    elif sys.stderr.isatty():
        with _bar(total, title) as advance:
            yield advance
    else:
        yield lambda n: None


def _counting(report: Report, total: int) -> Callable[[int], None]:
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        report(done, total)

    return advance


@contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=total)

        def advance(n: int) -> None:
            bar.advance(task, n)
            # drawn from here and not from rich's thread: workers may be forked at any time
            if bar.tasks[0].completed % 50 < n or bar.finished:
                bar.refresh()

        yield advance
