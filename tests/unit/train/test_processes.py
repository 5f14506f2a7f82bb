import subprocess
import sys

import pytest
import torch
from tokar.conf.spine import Strategy
from tokar.errors import UserError
from tokar.train.processes import Alone, processes

LAUNCHED = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def started_by(monkeypatch):
    def variables(**found):
        for name in LAUNCHED:
            monkeypatch.delenv(name, raising=False)
        for name, value in found.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.mark.parametrize(
    "variables",
    [{}, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1"}, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
)
def test_one_process_is_alone(started_by, variables):
    started_by(**variables)
    found = processes(Strategy(), torch.device("cpu"))
    assert isinstance(found, Alone)
    assert (found.global_rank, found.world_size, found.device.type) == (0, 1, "cpu")


def test_a_single_strategy_that_was_started_several_times_is_refused(started_by):
    started_by(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="2")
    with pytest.raises(UserError, match="torchrun started 2 processes, the strategy has 1 on each of 1 nodes"):
        processes(Strategy(), torch.device("cpu"))


def test_a_run_in_one_process_imports_no_lightning():
    names = "{'lightning', 'torchmetrics', 'deepspeed', 'wandb', 'transformers', 'scipy', 'matplotlib', 'sklearn'}"
    code = f"import sys, tokar.train.run, tokar.train.stages; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
