"""Real processes: a prepared data set, and commands started by a parent that has imported everything once."""

import multiprocessing
from pathlib import Path

import pytest
from processes import PRELOAD, Command, Ranks


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Prepared shards of the handwritten digits at 16 pixels."""
    from tokar.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, size=16)
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """`launch(folder, arguments, environment)` → a running `Command` with `folder` as its working directory."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    logs = tmp_path_factory.mktemp("logs")
    count = iter(range(10_000))
    return lambda folder, arguments, environment: Command(
        server, list(arguments), logs / f"{next(count)}.log", folder, environment
    )


@pytest.fixture(scope="session")
def start(launch):
    """`start(folder, "train", "tokenizer", …)` → a running `Command`."""
    return lambda folder, *arguments: launch(folder, arguments, {})


@pytest.fixture(scope="session")
def start_ranks(launch):
    """`start_ranks(folder, 2, "train", …)` → the running `Ranks` of one command."""
    return lambda folder, world, *arguments: Ranks(lambda environment: launch(folder, arguments, environment), world)
