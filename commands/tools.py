"""Speeds, estimates, completion."""

from __future__ import annotations

from pathlib import Path

from .command import OVERRIDES, Arguments, Command, argument, say, table


def _bench(arguments: Arguments) -> int:
    from ..train.bench import bench

    overrides = [word for word in arguments.words if "=" in word or word.startswith("~")]
    more = ["profile=true"] if arguments.profile else []
    return bench([word for word in arguments.words if word not in overrides], [*overrides, *more])


def _bench_compare(arguments: Arguments) -> int:
    from ..train.bench_table import columns_of, compared

    return say(columns_of(compared(Path(arguments.first), Path(arguments.second))))


def _estimate(arguments: Arguments) -> int:
    from ..train.estimate import estimate

    return table(estimate(arguments.stage, arguments.overrides))


def _completion(arguments: Arguments) -> int:
    from ..completion import SCRIPTS

    return say(SCRIPTS[arguments.shell])


COMMANDS = (
    Command("bench", "measure speeds on this machine", _bench,
            (argument("words", nargs="*", metavar="WHAT|KEY=VALUE", help="what to measure; everything when left out"),
             argument("--profile", action="store_true", help="also trace each row and name its ten dearest operations")),
            stage="bench", example="tokar bench loader sampler --profile", read_on="docs/performance.md"),
    Command("bench compare", "print the ratios of two results of bench", _bench_compare,
            (argument("first", metavar="A.json", help="what bench wrote"), argument("second", metavar="B.json", help="later")),
            example="tokar bench compare runs/before.json runs/bench.json"),
    Command("estimate", "say whether a training fits on a machine and how long a step takes, without a GPU", _estimate,
            (argument("stage", metavar="STAGE", choices=("tokenizer", "generator", "classifier")), OVERRIDES),
            example="tokar estimate generator experiment=llamagen_3b codes_of=llamagen_vq16 strategy=fsdp device=h100",
            read_on="docs/scaling.md"),
    Command("completion", "print the script that completes `tokar` in a shell", _completion,
            (argument("shell", choices=("bash", "zsh", "fish")),), example='eval "$(tokar completion bash)"'),
)  # fmt: skip
