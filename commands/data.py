"""Images to shards, and what is in them."""

from __future__ import annotations

import json

from .command import OVERRIDES, Arguments, Command, argument, say, table


def _data_prepare(arguments: Arguments) -> int:
    from ..conf.compose import compose

    config = compose("prepare", arguments.overrides).typed
    from ..data.prepare import prepare

    settings = config.model_dump(include={"splits", "workers", "shard_size", "format", "quality", "on_bad"})
    written = prepare(config.data.source, config.data.path, size=config.data.prepare_size, **settings)
    columns = ("count", "skipped", "classes", "shards", "bytes", "kept", "seconds", "folder")
    return table([("split", *columns), *((split, *map(facts.get, columns)) for split, facts in written.items())])


def _data_inspect(arguments: Arguments) -> int:
    from ..data.check import inspect

    return say(json.dumps(inspect(arguments.folder, arguments.picture), indent=2, ensure_ascii=False))


def _data_verify(arguments: Arguments) -> int:
    from ..data.check import verify

    problems = verify(arguments.folder, arguments.decode)
    say("\n".join(problems) if problems else f"{arguments.folder}: ok")
    return 1 if problems else 0


COMMANDS = (
    Command("data prepare", "write images as shards with an index", _data_prepare, (OVERRIDES,), stage="prepare",
            example="tokar data prepare data=cifar10 data.source=cifar10-train.zip workers=4"),
    Command("data inspect", "say what a folder of shards holds", _data_inspect,
            (argument("folder", metavar="FOLDER"), argument("--picture", metavar="FILE", help="draw the first 64 images")),
            example="tokar data inspect datasets/digits --picture digits.png"),
    Command("data verify", "compare shards with their checksums and index", _data_verify,
            (argument("folder", metavar="FOLDER"), argument("--decode", action="store_true", help="decode all images")),
            example="tokar data verify datasets/digits"),
)  # fmt: skip
