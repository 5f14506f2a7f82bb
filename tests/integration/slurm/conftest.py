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
