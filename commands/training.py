"""The stages that train."""

from __future__ import annotations

from .command import OVERRIDES, Arguments, Command, argument


def _train(arguments: Arguments) -> int:
    if arguments.multirun:
        from ..train.multirun import multirun

        return multirun(arguments.stage, arguments.overrides, arguments.objective)
    from ..conf.compose import compose

    composed = compose(arguments.stage, arguments.overrides)
    from ..train.run import start

    return start(composed)


MULTIRUN = argument("-m", "--multirun", action="store_true", help="run every combination of comma-separated values")
OBJECTIVE = argument("--objective", metavar="METRIC", help="with --multirun: the metric that a sweeper minimises")
TRAINING = (OVERRIDES, MULTIRUN, OBJECTIVE)

COMMANDS = (
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
)  # fmt: skip
