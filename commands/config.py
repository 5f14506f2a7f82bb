"""What a command would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .command import OVERRIDES, Arguments, Command, argument, say

if TYPE_CHECKING:
    from ..conf.compose import Composed


def _config_show(arguments: Arguments) -> int:
    from ..conf.explain import explain, highlight

    if arguments.explain:
        return say("\n".join(explain(arguments.stage, arguments.overrides)))
    from ..conf.compose import compose

    return say(highlight(compose(arguments.stage, arguments.overrides).yaml()))


def _config_check(arguments: Arguments) -> int:
    from ..conf.compose import compose

    return say(f"ok: {_summary(compose(arguments.stage, arguments.overrides))}")


def _summary(composed: Composed) -> str:
    """A checked config in one line; a training run begins with its folder."""
    from ..conf.duration import Duration
    from ..conf.spine import Spine
    from ..train.folder import run_folder

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


COMMANDS = (
    Command("config show", "print the config that a command would use", _config_show,
            (argument("stage", metavar="STAGE"), OVERRIDES,
             argument("--explain", action="store_true", help="every key with its type, its value and what it means")),
            example="tokar config show tokenizer experiment=digits_vqgan"),
    Command("config check", "say every problem of a config, without running it", _config_check,
            (argument("stage", metavar="STAGE"), OVERRIDES), example="tokar config check generator optim.lr=3e-4"),
)  # fmt: skip
