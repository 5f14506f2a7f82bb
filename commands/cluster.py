"""Jobs of Slurm."""

from __future__ import annotations

from pathlib import Path

from .command import OVERRIDES, Arguments, Command, argument, table


def _slurm_submit(arguments: Arguments) -> int:
    from ..slurm.submit import submit

    return submit(arguments.stage, arguments.overrides, arguments.dry_run)


def _slurm_pipeline(arguments: Arguments) -> int:
    from ..slurm.pipeline import pipeline

    return pipeline(arguments.overrides, arguments.dry_run)


def _slurm_status(arguments: Arguments) -> int:
    from ..slurm.jobs import status

    return table(list(status([Path(run) for run in arguments.runs])))


def _slurm_logs(arguments: Arguments) -> int:
    from ..slurm.jobs import logs

    return logs(Path(arguments.run), arguments.lines, arguments.follow)


def _slurm_stop(arguments: Arguments) -> int:
    from ..slurm.jobs import stop

    return stop(Path(arguments.run), arguments.now)


def _slurm_requeue(arguments: Arguments) -> int:
    from ..slurm.jobs import requeue

    return requeue(Path(arguments.run), arguments.now)


DRY_RUN = argument("--dry-run", action="store_true", help="print what would be submitted")
JOB_RUN = argument("run", metavar="RUN", help="a run folder that was submitted")

COMMANDS = (
    Command("slurm submit", "submit a stage as a job that saves and requeues itself", _slurm_submit,
            (argument("stage", metavar="STAGE", help="tokenizer, generator, classifier, distill, encode, pairs, sample, …"),
             OVERRIDES, DRY_RUN), example="tokar slurm submit tokenizer experiment=digits_vqgan cluster=node8",
            read_on="slurm/README.md; keys of the cluster: tokar config show slurm --explain"),
    Command("slurm pipeline", "submit a chain of jobs: conf/pipeline", _slurm_pipeline, (OVERRIDES, DRY_RUN),
            example="tokar slurm pipeline experiment=digits cluster=cpu generator:optim.lr=1e-3",
            read_on="slurm/README.md"),
    Command("slurm status", "say what became of jobs", _slurm_status,
            (argument("runs", nargs="+", metavar="RUN", help="run folders that were submitted"),),
            example="tokar slurm status runs/digits_vqgan"),
    Command("slurm logs", "show the end of a job's log", _slurm_logs,
            (JOB_RUN, argument("--lines", type=int, default=40, metavar="N", help="how many; default: 40"),
             argument("--follow", action="store_true", help="go on showing what is added")),
            example="tokar slurm logs runs/digits_vqgan --follow"),
    Command("slurm stop", "let a job save and end, without a requeue", _slurm_stop,
            (JOB_RUN, argument("--now", action="store_true", help="cancel it instead")),
            example="tokar slurm stop runs/digits_vqgan"),
    Command("slurm requeue", "let a job save and start again, or submit one that ended", _slurm_requeue,
            (JOB_RUN, argument("--now", action="store_true", help="do not wait until it has saved")),
            example="tokar slurm requeue runs/digits_vqgan"),
)  # fmt: skip
