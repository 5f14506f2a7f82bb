"""What `tokar` can do: a table of commands. Each imports what it runs only when it runs: help and config errors are quick."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .conf.compose import Composed

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


def _completion(arguments: Arguments) -> int:
    from .completion import SCRIPTS

    return say(SCRIPTS[arguments.shell])


def _data_prepare(arguments: Arguments) -> int:
    from .conf.compose import compose

    config = compose("prepare", arguments.overrides).typed
    from .data.prepare import prepare

    settings = config.model_dump(include={"splits", "workers", "shard_size", "format", "quality", "on_bad"})
    written = prepare(config.data.source, config.data.path, size=config.data.prepare_size, **settings)
    columns = ("count", "skipped", "classes", "shards", "bytes", "kept", "seconds", "folder")
    return table([("split", *columns), *((split, *map(facts.get, columns)) for split, facts in written.items())])


def _data_inspect(arguments: Arguments) -> int:
    from .data.check import inspect

    return say(json.dumps(inspect(arguments.folder, arguments.picture), indent=2, ensure_ascii=False))


def _data_verify(arguments: Arguments) -> int:
    from .data.check import verify

    problems = verify(arguments.folder, arguments.decode)
    say("\n".join(problems) if problems else f"{arguments.folder}: ok")
    return 1 if problems else 0


def _train(arguments: Arguments) -> int:
    if arguments.multirun:
        from .train.multirun import multirun

        return multirun(arguments.stage, arguments.overrides, arguments.objective)
    from .conf.compose import compose

    compose(arguments.stage, arguments.overrides)  # so that its errors come before the slow imports
    from .train.run import train

    return train(arguments.stage, arguments.overrides)


def _sweep(arguments: Arguments) -> int:
    from .sweep.command import sweep

    return sweep(arguments.stage, arguments.overrides)


def _sweep_status(arguments: Arguments) -> int:
    from .sweep.tables import status

    rows, lines = status(Path(arguments.sweep))
    table(rows)
    return say("\n".join(lines))


def _sweep_best(arguments: Arguments) -> int:
    from .sweep.tables import best

    return table(best(Path(arguments.sweep)))


def _sweep_report(arguments: Arguments) -> int:
    from .sweep.page import write_page

    folder = Path(arguments.sweep)
    return say(str(write_page(folder, Path(arguments.out) if arguments.out else folder / "report.html")))


def _sweep_work(arguments: Arguments) -> int:
    from .sweep.array import work

    return work(Path(arguments.sweep), arguments.point)


def _encode(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    composed = compose("encode", [quoted("model", arguments.run), *arguments.overrides])
    from .train.encode import encode

    return encode(composed)


def _pairs(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    composed = compose("pairs", [quoted("model", arguments.run), *arguments.overrides])
    from .train.pairs import make_pairs

    return make_pairs(composed)


def _compare(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    composed = compose("compare", [quoted("model", arguments.run), *arguments.overrides])
    from .evaluate.compare import compare

    return table(compare(composed))


def _sample(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    composed = compose("sample", [quoted("model", arguments.run), *arguments.overrides])
    from .train.sample import sample

    return sample(composed)


def _evaluate(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    composed = compose("evaluate", [quoted("target", arguments.target), *arguments.overrides])
    from .evaluate.run import evaluate

    return evaluate(composed)


def _probe(arguments: Arguments) -> int:
    from .conf.compose import compose
    from .conf.overrides import quoted

    tokenizer = quoted("codes.tokenizer", arguments.run)
    compose("generator", ["experiment=ar_probe", tokenizer, *arguments.overrides])  # its errors before the slow imports
    from .train.probe import probe

    return probe(Path(arguments.run), arguments.overrides, arguments.features, arguments.count)


def _report(arguments: Arguments) -> int:
    from .evaluate.report import write_report

    runs = [Path(run) for run in arguments.runs]
    out = Path(arguments.out) if arguments.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    return say(str(write_report(runs, out)))


def _config_show(arguments: Arguments) -> int:
    from .conf.explain import explain, highlight

    if arguments.explain:
        return say("\n".join(explain(arguments.stage, arguments.overrides)))
    from .conf.compose import compose

    return say(highlight(compose(arguments.stage, arguments.overrides).yaml()))


def _config_check(arguments: Arguments) -> int:
    from .conf.compose import compose

    return say(f"ok: {summary(compose(arguments.stage, arguments.overrides))}")


def summary(composed: Composed) -> str:
    """A checked config in one line; a training run begins with its folder."""
    from .conf.duration import Duration
    from .conf.spine import Spine
    from .train.folder import run_folder

    config = composed.typed
    if not isinstance(config, Spine):
        return f"config of `{config.stage}`"
    loop, optim, strategy = config.loop, config.optim, config.strategy
    parts = (
        str(run_folder(composed)),
        f"{config.data.source} at {config.data.image_size} px",
        f"{Duration.parse(loop.duration)} of {loop.batch_size}",
        f"{optim.name} {optim.lr:g}",
        f"{strategy.name} × {strategy.devices * strategy.nodes} {strategy.precision}",
    )
    return " · ".join(parts)


def _estimate(arguments: Arguments) -> int:
    from .train.estimate import estimate

    return table(estimate(arguments.stage, arguments.overrides))


def _bench(arguments: Arguments) -> int:
    from .train.bench import bench

    overrides = [word for word in arguments.words if "=" in word or word.startswith("~")]
    return bench([word for word in arguments.words if word not in overrides], overrides)


def _convert(arguments: Arguments) -> int:
    from .models.build import locate_model
    from .models.convert.files import convert_file, export_original

    source, out = Path(arguments.file), Path(arguments.out) if arguments.out else None
    if source.is_dir():
        if out is None:
            raise UserError("no file to write", where=source, fix="give one: tokar convert MODEL OUT.safetensors")
        family = export_original(locate_model(source), out, arguments.family)
        return say(f"{out}: {family.name} in its original layout")
    report = convert_file(source, out, arguments.family)
    rows = [("family", report.family), ("weights under", report.wrapper or "(bare)"), ("tensors", report.tensors),
            ("parameters", f"{report.parameters:,}"), ("dropped", ", ".join(report.dropped) or "nothing"),
            ("written", report.folder or "nothing; give a folder to write the model")]  # fmt: skip
    return table(rows)


def _parity(arguments: Arguments) -> int:
    from .models.convert.parity import run_parity

    reports = [run_parity(Path(file)) for file in arguments.files]
    rows = [(report.file.name, report.family, item.name, item.note or f"{item.difference:.2e}", item.verdict)
            for report in reports for item in report.comparisons]  # fmt: skip
    table([("file", "family", "output", "largest difference", ""), *rows])
    return 0 if all(report.ok for report in reports) else 1


def _export(arguments: Arguments) -> int:
    from .models.build import export_model

    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not empty", where=out, fix="give a new folder")
    return say(f"{export_model(Path(arguments.run), out, ema=not arguments.raw)}: model and config")


def _slurm_submit(arguments: Arguments) -> int:
    from .slurm.submit import submit

    return submit(arguments.stage, arguments.overrides, arguments.dry_run)


def _slurm_pipeline(arguments: Arguments) -> int:
    from .slurm.pipeline import pipeline

    return pipeline(arguments.overrides, arguments.dry_run)


def _slurm_status(arguments: Arguments) -> int:
    from .slurm.jobs import status

    return table(list(status([Path(run) for run in arguments.runs])))


def _slurm_logs(arguments: Arguments) -> int:
    from .slurm.jobs import logs

    return logs(Path(arguments.run), arguments.lines, arguments.follow)


def _slurm_stop(arguments: Arguments) -> int:
    from .slurm.jobs import stop

    return stop(Path(arguments.run), arguments.now)


def _slurm_requeue(arguments: Arguments) -> int:
    from .slurm.jobs import requeue

    return requeue(Path(arguments.run), arguments.now)


def argument(*names: str, **settings: Any) -> Argument:
    """An argument as `ArgumentParser.add_argument` takes it."""
    return names, settings


OVERRIDES = argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config, or GROUP=OPTION")
MULTIRUN = argument("-m", "--multirun", action="store_true", help="run every combination of comma-separated values")
OBJECTIVE = argument("--objective", metavar="METRIC", help="with --multirun: the metric that a sweeper minimises")
TRAINING = (OVERRIDES, MULTIRUN, OBJECTIVE)
SWEEP = argument("sweep", metavar="FOLDER", help="of a sweep, as `tokar sweep STAGE …` names it")
RUN = "a run, a checkpoint or an exported model"
DRY_RUN = argument("--dry-run", action="store_true", help="print what would be submitted")
JOB_RUN = argument("run", metavar="RUN", help="a run folder that was submitted")

GROUPS: dict[str, tuple[Command, ...]] = {
    "Data": (
        Command("data prepare", "write images as shards with an index", _data_prepare, (OVERRIDES,), stage="prepare",
                example="tokar data prepare data=cifar10 data.source=cifar10-train.zip workers=4"),
        Command("data inspect", "say what a folder of shards holds", _data_inspect,
                (argument("folder", metavar="FOLDER"), argument("--picture", metavar="FILE", help="draw the first 64 images")),
                example="tokar data inspect datasets/digits --picture digits.png"),
        Command("data verify", "compare shards with their checksums and index", _data_verify,
                (argument("folder", metavar="FOLDER"), argument("--decode", action="store_true", help="decode all images")),
                example="tokar data verify datasets/digits"),
    ),
    "Training (the same command again goes on where it stopped)": (
        Command("train tokenizer", "train an image tokenizer", _train, TRAINING, stage="tokenizer",
                example="tokar train tokenizer experiment=digits_vqgan -m optim.lr=1e-3,3e-4"),
        Command("train generator", "train a generator of codes", _train, TRAINING, stage="generator",
                example="tokar train generator experiment=digits_llamagen codes.path=datasets/codes"),
        Command("train distill", "train a one-step student of a generator", _train, TRAINING, stage="distill",
                example="tokar train distill experiment=dd1_digits"),
        Command("train diffusion", "train the diffusion form of a generator, where dd2 begins", _train, TRAINING,
                stage="diffusion", example="tokar train diffusion model=runs/digits_llamagen loop.duration=2000"),
        Command("train dd2", "train a one-step generator by conditional score distillation", _train, TRAINING, stage="dd2",
                example="tokar train dd2 model=runs/digits_llamagen diffusion=runs/diffusion loop.duration=2000"),
        Command("train classifier", "train the small judge of samples", _train, TRAINING, stage="classifier",
                example="tokar train classifier experiment=digits_classifier"),
    ),
    "Sweeps (the same command again starts what is missing)": (
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
    ),
    "From what was trained": (
        Command("encode", "turn images into code shards", _encode, (argument("run", metavar="RUN", help=RUN), OVERRIDES),
                stage="encode", example="tokar encode runs/digits_vqgan out=datasets/digits-codes"),
        Command("distill pairs", "write noise and the codes that a teacher turns it into", _pairs,
                (argument("run", metavar="TEACHER", help=RUN), OVERRIDES), stage="pairs",
                example="tokar distill pairs runs/digits_llamagen count=20000 sampling.guidance=2"),
        Command("distill compare", "measure a teacher, its one-step students and what needs no training in one table", _compare,
                (argument("run", metavar="TEACHER", help=RUN), OVERRIDES), stage="compare",
                example="tokar distill compare runs/digits_llamagen student=runs/dd1_digits features.path=runs/judge"),
        Command("sample", "draw images from a generator", _sample, (argument("run", metavar="RUN", help=RUN), OVERRIDES),
                stage="sample", example="tokar sample runs/digits_llamagen count=100 sampling.guidance=2"),
        Command("evaluate", "measure a run, a model or a set of images", _evaluate,
                (argument("target", metavar="TARGET", help=f"{RUN}, an npz or a folder of images"), OVERRIDES),
                stage="evaluate", example="tokar evaluate runs/digits_vqgan features.path=runs/digits_classifier"),
        Command("probe", "train a small generator on a tokenizer's codes and measure both", _probe,
                (argument("run", metavar="RUN", help=f"a tokenizer: {RUN}"), OVERRIDES,
                 argument("--features", metavar="[NAME=]PATH", help="classifier run, or inception=FILE, dinov2=FOLDER: also "
                          "measure samples"),
                 argument("--count", metavar="N", type=int, help="samples; default: as many as validation images")),
                stage="generator", example="tokar probe runs/digits_vqgan --features runs/digits_classifier"),
        Command("report", "write one HTML page on one or more runs", _report,
                (argument("runs", nargs="+", metavar="RUN", help="run folders"),
                 argument("--out", metavar="FILE", help="default: report.html in the run, or here for several")),
                example="tokar report runs/digits_vqgan runs/digits_llamagen --out report.html"),
    ),
    "On a Slurm cluster (read on: slurm/README.md)": (
        Command("slurm submit", "submit a stage as a job that saves and requeues itself", _slurm_submit,
                (argument("stage", metavar="STAGE", help="tokenizer, generator, classifier, encode, sample or evaluate"),
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
    ),
    "Config": (
        Command("config show", "print the config that a command would use", _config_show,
                (argument("stage", metavar="STAGE"), OVERRIDES,
                 argument("--explain", action="store_true", help="every key with its type, its value and what it means")),
                example="tokar config show tokenizer experiment=digits_vqgan"),
        Command("config check", "say every problem of a config, without running it", _config_check,
                (argument("stage", metavar="STAGE"), OVERRIDES), example="tokar config check generator optim.lr=3e-4"),
    ),
    "Weights": (
        Command("convert", "read published weights into a model folder, or write a model in its original layout", _convert,
                (argument("file", metavar="FILE", help="a published checkpoint, or a model to write back"),
                 argument("out", nargs="?", metavar="OUT", help="folder to write; without it only say what was found"),
                 argument("--family", metavar="NAME", help="recognised from the keys when not given")),
                example="tokar convert vq_ds16_c2i.pt models/vq16"),
        Command("parity", "compare our models with the original's answers", _parity,
                (argument("files", nargs="+", metavar="FILE", help="weights, inputs and answers in one safetensors file"),),
                example="tokar parity llamagen_vq.safetensors"),
        Command("export", "write the weights of a run as a model folder", _export,
                (argument("run", metavar="RUN", help=RUN), argument("out", metavar="OUT", help="a new folder"),
                 argument("--raw", action="store_true", help="the trained weights instead of their average (EMA)")),
                example="tokar export runs/digits_vqgan models/digits_vqgan"),
    ),
    "Tools": (
        Command("bench", "measure speeds on this machine", _bench,
                (argument("words", nargs="*", metavar="WHAT|KEY=VALUE", help="what to measure; everything when left out"),),
                example="tokar bench loader sampler"),
        Command("estimate", "say whether a training fits on a machine and how long a step takes, without a GPU", _estimate,
                (argument("stage", metavar="STAGE", choices=("tokenizer", "generator", "classifier")), OVERRIDES),
                example="tokar estimate generator experiment=llamagen_3b codes_of=llamagen_vq16 strategy=fsdp device=h100",
                read_on="docs/scaling.md"),
        Command("completion", "print the script that completes `tokar` in a shell", _completion,
                (argument("shell", choices=("bash", "zsh", "fish")),), example='eval "$(tokar completion bash)"'),
    ),
}  # fmt: skip
COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)
