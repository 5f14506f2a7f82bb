import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from tokar.conf.spine import Strategy
from tokar.errors import UserError
from tokar.train.processes import Alone, Joined, processes

LAUNCHED = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "TOKAR_PARENT")

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1",
}  # fmt: skip


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
    started_by(**TORCHRUN)
    with pytest.raises(UserError, match="torchrun started 2 processes, the strategy has 1 on each of 1 nodes"):
        processes(Strategy(), torch.device("cpu"))


def test_a_run_in_one_process_imports_no_lightning():
    names = "{'lightning', 'torchmetrics', 'deepspeed', 'wandb', 'transformers', 'scipy', 'matplotlib', 'sklearn'}"
    code = f"import sys, tokar.train.run, tokar.train.stages; print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("job", "told"), [({"SLURM_JOB_ID": "1"}, "its own"), ({}, None)])
def test_fabric_starts_the_ranks_of_a_machine_also_inside_a_job(started_by, monkeypatch, job, told):
    started_by(**job)
    asked = {}
    fabric = SimpleNamespace(Fabric=asked.update)
    monkeypatch.setitem(sys.modules, "lightning.fabric", fabric)
    environments = SimpleNamespace(LightningEnvironment=lambda: "its own")  # not the one that takes srun's part in a job
    monkeypatch.setitem(sys.modules, "lightning.fabric.plugins.environments", environments)
    monkeypatch.setitem(sys.modules, "lightning.fabric.strategies", SimpleNamespace(DDPStrategy=dict))
    processes(Strategy(name="ddp", devices=2, timeout=60), torch.device("cpu"))
    assert (asked["plugins"], asked["devices"], asked["num_nodes"]) == (told, 2, 1)
    assert asked["strategy"] == {"process_group_backend": None, "timeout": timedelta(seconds=60)}


def test_ranks_that_others_have_started_import_no_lightning(started_by, monkeypatch):
    started_by(**TORCHRUN)
    monkeypatch.setitem(sys.modules, "lightning", None)  # an import fails
    found = processes(Strategy(name="ddp", devices=2), torch.device("cpu"))
    assert isinstance(found, Joined)
    assert (found.global_rank, found.local_rank, found.world_size, found.device.type) == (1, 1, 2, "cpu")


def test_a_rank_that_sees_too_few_gpus_is_told(started_by, monkeypatch):
    started_by(**TORCHRUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this process sees 1 GPUs, the strategy has 2 ranks on each node; set it to 1"):
        processes(Strategy(name="ddp", devices=2), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes(Strategy(name="ddp", devices=2), torch.device("cuda")).device == torch.device("cuda", 1)
