"""What a command is, the arguments that several share, and how commands speak."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Arguments = argparse.Namespace
Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """One row of the table.

    Args:
        name: the words that call it.
        about: one line of help.
        run: what it does; returns the exit code.
        arguments: names and settings as `ArgumentParser.add_argument` takes them.
        example: a line to copy.
        stage: whose config its overrides change.
        read_on: where more is written.
    """

    name: str
    about: str
    run: Callable[[Arguments], int]
    arguments: tuple[Argument, ...] = ()
    example: str = ""
    stage: str = ""
    read_on: str = ""


def say(text: str) -> int:
    """Write to the standard output; returns the exit code of success."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    return 0


def table(rows: Sequence[Sequence[object]]) -> int:
    """Write rows as left-aligned columns, as wide as they must be; returns the exit code of success."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return say("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts))


def argument(*names: str, **settings: Any) -> Argument:
    """An argument as `ArgumentParser.add_argument` takes it."""
    return names, settings


OVERRIDES = argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config, or GROUP=OPTION")
RUN = "a run, a checkpoint or an exported model"
