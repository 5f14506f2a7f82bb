"""Fixtures shared by all tests: where the optional folder of data and parity files lies."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its pool of compilers takes longer to start than to compile

ROOT = Path(__file__).resolve().parents[1]


def _optional(*parts: str) -> Path:
    folder = ROOT.parent.joinpath("shared", *parts)
    if not folder.exists():
        pytest.skip(f"needs {'/'.join(('..', 'shared', *parts))} beside the repository")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """CIFAR-10 and ImageNet samples as zips of JPEGs."""
    return _optional("data")


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    """Answers of the original implementations on small random weights."""
    return _optional("parity")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TOKAR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
