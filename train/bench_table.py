"""One form for every row of `tokar bench`, all rows as one table, and two results side by side. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError

Row = dict[str, float]
"""Values by name; those of `COLUMNS` mean the same in every row."""
COLUMNS = {
    "step_ms": "ms a call", "images_per_s": "images/s", "tokens_per_s": "tokens/s", "gflop_per_image": "GFLOP/image",
    "tflops": "TFLOP/s", "mfu": "MFU", "memory_mib": "MiB", "ratio": "ratio",
}  # fmt: skip
"""`gflop_per_image` counts products, convolutions and attention, as the model has them. `mfu` is `tflops` over the peak
of the device (`peaks.py`). `ratio` is the fast path over its plain twin."""


def overview(rows: Mapping[str, Row]) -> list[tuple[str, ...]]:
    """All rows as one table, its head first: the columns that any of them has."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    cells = [(what, *(_short(row[name]) if name in row else "" for name in columns)) for what, row in rows.items()]
    return [("", *(COLUMNS[name] for name in columns)), *cells]


def compared(first: Path, second: Path) -> list[tuple[str, ...]]:
    """What two files of `tokar bench` have in common, with the ratio of the second to the first; their head first.

    Raises:
        UserError: no such files, or nothing in common.
    """
    (old, before), (new, after) = _read(first), _read(second)
    lines = [(what, name, before[what][name], after[what][name])
             for what in before if what in after for name in before[what] if name in after[what]]  # fmt: skip
    if not lines:
        raise UserError("have no row in common", where=f"{first} and {second}", fix="measure the same: tokar bench WHAT …")
    facts = [(key, "", str(old.get(key))[:40], str(new.get(key))[:40], "" if old.get(key) == new.get(key) else "differs")
             for key in ("commit", "device", "threads")]  # fmt: skip
    head = ("", "", str(first), str(second), "second / first")
    cells = [(what, name, _short(a), _short(b), f"{b / a:.3f}" if a else "") for what, name, a, b in lines]
    return [head, *(tuple(map(str, fact)) for fact in facts), *cells]


def _read(path: Path) -> tuple[dict[str, object], dict[str, Row]]:
    try:
        content = json.loads(path.read_text())
        return content, {what: dict(row) for what, row in content["rows"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("no readable result of a bench", where=path, fix="give two files that tokar bench wrote") from error


def _short(value: float) -> str:
    """Four digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def columns_of(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)
