"""What is made of a run: codes, samples, numbers, pages."""

from __future__ import annotations

from pathlib import Path

from .command import OVERRIDES, RUN, Arguments, Command, argument, say, table


def _encode(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    composed = compose("encode", [quoted("model", arguments.run), *arguments.overrides])
    from ..train.encode import encode

    return encode(composed)


def _pairs(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    composed = compose("pairs", [quoted("model", arguments.run), *arguments.overrides])
    from ..train.pairs import make_pairs

    return make_pairs(composed)


def _compare(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    composed = compose("compare", [quoted("model", arguments.run), *arguments.overrides])
    from ..evaluate.compare import compare

    return table(compare(composed))


def _sample(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    composed = compose("sample", [quoted("model", arguments.run), *arguments.overrides])
    from ..train.sample import sample

    return sample(composed)


def _evaluate(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    composed = compose("evaluate", [quoted("target", arguments.target), *arguments.overrides])
    from ..train.evaluate import evaluate_on_ranks

    return evaluate_on_ranks(composed)


def _probe(arguments: Arguments) -> int:
    from ..conf.compose import compose
    from ..conf.overrides import quoted

    tokenizer = quoted("codes.tokenizer", arguments.run)
    compose("generator", ["experiment=ar_probe", tokenizer, *arguments.overrides])  # its errors before the slow imports
    from ..train.probe import probe

    return probe(Path(arguments.run), arguments.overrides, arguments.features, arguments.count)


def _report(arguments: Arguments) -> int:
    from ..evaluate.report.page import write_report

    runs = [Path(run) for run in arguments.runs]
    out = Path(arguments.out) if arguments.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    return say(str(write_report(runs, out)))


COMMANDS = (
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
)  # fmt: skip
