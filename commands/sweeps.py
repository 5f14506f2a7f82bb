"""Many runs of one space."""

from __future__ import annotations

from pathlib import Path

from .command import OVERRIDES, Arguments, Command, argument, say, table


def _sweep(arguments: Arguments) -> int:
    from ..sweep.command import sweep

    return sweep(arguments.stage, arguments.overrides)


def _sweep_status(arguments: Arguments) -> int:
    from ..sweep.tables import status

    rows, lines = status(Path(arguments.sweep))
    table(rows)
    return say("\n".join(lines))


def _sweep_best(arguments: Arguments) -> int:
    from ..sweep.tables import best

    return table(best(Path(arguments.sweep)))


def _sweep_report(arguments: Arguments) -> int:
    from ..sweep.page import write_page

    folder = Path(arguments.sweep)
    return say(str(write_page(folder, Path(arguments.out) if arguments.out else folder / "report.html")))


def _sweep_work(arguments: Arguments) -> int:
    from ..sweep.array import work

    return work(Path(arguments.sweep), arguments.point)


SWEEP = argument("sweep", metavar="FOLDER", help="of a sweep, as `tokar sweep STAGE …` names it")

COMMANDS = (
    Command("sweep", "run many points of a space: grid, random or Optuna, here or as a SLURM array", _sweep,
            (argument("stage", metavar="STAGE", help="tokenizer, generator or classifier"), OVERRIDES),
            example="tokar sweep classifier experiment=digits_classifier optim.lr=1e-3,3e-3 seed=0,1"),
    Command("sweep status", "say how every point of a sweep stands", _sweep_status, (SWEEP,),
            example="tokar sweep status runs/sweeps/lr"),
    Command("sweep best", "name the best point of a sweep", _sweep_best, (SWEEP,),
            example="tokar sweep best runs/sweeps/lr"),
    Command("sweep report", "write one HTML page on a sweep: parallel coordinates, curves, table", _sweep_report,
            (SWEEP, argument("--out", metavar="FILE", help="default: report.html in the folder")),
            example="tokar sweep report runs/sweeps/lr"),
    Command("sweep work", "run one point of a sweep; what each job of an array does", _sweep_work,
            (SWEEP, argument("--point", metavar="N", type=int, help="its number; default: the next that is free")),
            example="tokar sweep work runs/sweeps/lr --point 3"),
)  # fmt: skip
