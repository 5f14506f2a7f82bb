"""What commands print: lines and small tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def say(line: str) -> None:
    """One line of output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def table(title: str, values: Mapping[str, float | str]) -> str:
    """Names and values under a title, in two columns."""
    shown = {name: value if isinstance(value, str) else f"{value:.4f}" for name, value in values.items()}
    left, right = max(map(len, shown), default=0), max(map(len, shown.values()), default=0)
    return "\n".join([title, *(f"  {name:<{left}}  {value:>{right}}" for name, value in shown.items())])
