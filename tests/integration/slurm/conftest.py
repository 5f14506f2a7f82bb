"""A Slurm of the test session's own, fetched and started when the first test asks for it; tests skip where it cannot be had."""

from collections.abc import Iterator

import pytest
from minislurm import Cluster, Unavailable, fetch


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Two nodes of this session; each pytest-xdist worker has a cluster of its own, on ports of its own."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        fetch(folder)
    except Unavailable as why:
        pytest.skip(f"no Slurm: {why}")
    running = Cluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def login(cluster, tmp_path, monkeypatch, capsys):
    """A login node: `login("slurm", "submit", …)` runs a command of tokar in `tmp_path`; returns what it printed.

    With `code=2` it must fail so, and what it said on the standard error is returned.
    """
    from tokar.cli import main

    for name in ("SLURM_CONF", "PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        capsys.readouterr()
        ended = main(list(words))
        said = capsys.readouterr()
        assert ended == code, said.out + said.err
        return said.err if code else said.out

    return run
