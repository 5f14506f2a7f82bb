"""What `tokar` can do: a table of commands. Each imports what it runs only when it runs: help and config errors are quick."""

from __future__ import annotations

import argparse
import json
import re
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


def positional(key: str, path: str) -> str:
    """A path given by position as the override of its key, quoted for Hydra's grammar."""
    # a backslash means itself there, except before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), path)
    return f"{key}='{escaped}'"


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
        from .train.sweep import sweep

        return sweep(arguments.stage, arguments.overrides, arguments.objective)
    from .conf.compose import compose

    compose(arguments.stage, arguments.overrides)  # so that its errors come before the slow imports
    from .train.run import train

    return train(arguments.stage, arguments.overrides)


def _encode(arguments: Arguments) -> int:
    from .conf.compose import compose

    composed = compose("encode", [positional("model", arguments.run), *arguments.overrides])
    from .train.encode import encode

    return encode(composed)


def _pairs(arguments: Arguments) -> int:
    from .conf.compose import compose

    composed = compose("pairs", [positional("model", arguments.run), *arguments.overrides])
    from .train.pairs import make_pairs

    return make_pairs(composed)


def _sample(arguments: Arguments) -> int:
    from .conf.compose import compose

    composed = compose("sample", [positional("model", arguments.run), *arguments.overrides])
    from .train.sample import sample

    return sample(composed)


def _evaluate(arguments: Arguments) -> int:
    from .conf.compose import compose

    composed = compose("evaluate", [positional("target", arguments.target), *arguments.overrides])
    from .evaluate.run import evaluate

    return evaluate(composed)


def _probe(arguments: Arguments) -> int:
    from .conf.compose import compose

    tokenizer = positional("codes.tokenizer", arguments.run)
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


def argument(*names: str, **settings: Any) -> Argument:
    """An argument as `ArgumentParser.add_argument` takes it."""
    return names, settings


OVERRIDES = argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config, or GROUP=OPTION")
MULTIRUN = argument("-m", "--multirun", action="store_true", help="run every combination of comma-separated values")
OBJECTIVE = argument("--objective", metavar="METRIC", help="with --multirun: the metric that a sweeper minimises")
TRAINING = (OVERRIDES, MULTIRUN, OBJECTIVE)
RUN = "a run, a checkpoint or an exported model"

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
    "From what was trained": (
        Command("encode", "turn images into code shards", _encode, (argument("run", metavar="RUN", help=RUN), OVERRIDES),
                stage="encode", example="tokar encode runs/digits_vqgan out=datasets/digits-codes"),
        Command("distill pairs", "write noise and the codes that a teacher turns it into", _pairs,
                (argument("run", metavar="TEACHER", help=RUN), OVERRIDES), stage="pairs",
                example="tokar distill pairs runs/digits_llamagen count=20000 sampling.guidance=2"),
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
        Command("completion", "print the script that completes `tokar` in a shell", _completion,
                (argument("shell", choices=("bash", "zsh", "fish")),), example='eval "$(tokar completion bash)"'),
    ),
}  # fmt: skip
COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)
