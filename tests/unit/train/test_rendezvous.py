import os

import pytest
from tokar.errors import UserError
from tokar.train.rendezvous import Place, by_srun, place

VARIABLES = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_ID": "0",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def started_by(monkeypatch):
    def set_variables(**variables):
        for name in (*TORCHRUN, "NODE_RANK", "TOKAR_PARENT", *VARIABLES):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_who_is_who_is_read_off_sruns_variables():
    assert by_srun(VARIABLES, nodes=2, devices=2) == Place(3, 1, 4, "gpu07", 12000 + 4711, parent=None)
    chosen = by_srun({**VARIABLES, "MASTER_ADDR": "ib7", "MASTER_PORT": "15000"}, 2, 2)
    assert (chosen.address, chosen.port) == ("ib7", 15000)


@pytest.mark.parametrize("name", [name for name in VARIABLES if name not in ("SLURM_STEP_ID", "SLURM_NODEID")])
def test_a_missing_variable_is_named(name):
    with pytest.raises(UserError, match=f"srun started this process, but {name} is not set; start with `tokar slurm submit`"):
        by_srun({key: value for key, value in VARIABLES.items() if key != name}, 2, 2)


def test_a_variable_that_is_no_number_is_told():
    with pytest.raises(UserError, match=r"cannot be read: .*'three'"):
        by_srun({**VARIABLES, "SLURM_PROCID": "three"}, 2, 2)


def test_another_number_of_processes_than_configured_is_refused():
    with pytest.raises(UserError, match="srun started 4 processes on 2 nodes, the strategy has 8 on each of 2"):
        by_srun(VARIABLES, nodes=2, devices=8)


def test_srun_is_recognised_whatever_the_job_is_called(started_by):
    started_by(**VARIABLES, SLURM_JOB_NAME="bash")
    assert place(2, 2) == by_srun(VARIABLES, 2, 2)


def test_one_process_in_a_job_starts_its_ranks_itself(started_by):
    started_by(**{**VARIABLES, "SLURM_STEP_NUM_TASKS": "1"})
    assert place(1, 2) is None


def test_torchrun_inside_a_job_is_torchruns(started_by):
    started_by(**VARIABLES, **TORCHRUN)
    assert place(2, 2) == Place(3, 1, 4, "here", 29500, os.getppid())
    with pytest.raises(UserError, match="torchrun started 4 processes, the strategy has 8 on each of 2 nodes"):
        place(2, 8)
    started_by(**VARIABLES, **{**TORCHRUN, "MASTER_PORT": ""})
    with pytest.raises(UserError, match="torchrun started this process, but MASTER_PORT is not set"):
        place(2, 2)


def test_the_ranks_that_the_first_one_starts_know_their_place(started_by):
    variables = {"TOKAR_PARENT": "7", "NODE_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    started_by(**variables, LOCAL_RANK="1")
    assert place(2, 2) == Place(3, 1, 4, "here", 29500, parent=7)
    started_by(**variables, LOCAL_RANK="0")
    assert place(2, 2) is None


def test_several_nodes_without_a_launcher_are_refused(started_by):
    started_by()
    with pytest.raises(UserError, match=r"strategy.nodes=2: this process was started alone; start with `tokar slurm submit`"):
        place(2, 1)
    assert place(1, 2) is None
