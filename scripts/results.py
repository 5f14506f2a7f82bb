"""Prints the evaluations of runs as one table: python scripts/results.py FOLDER_OF_RUNS."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokar.evaluate.protocol import Result


def main(folder: Path) -> None:
    """One row for each number."""
    table = Table("run", "evaluation", "number", "value", "protocol", box=None)
    for path in sorted(folder.glob("*/evaluation/*.json")):
        result = Result.load(path)
        for name, value in result.numbers.items():
            table.add_row(path.parents[1].name, result.name, name, f"{value:.4f}", result.protocol_id)
    Console(width=100).print(table)


main(Path(sys.argv[1]))
