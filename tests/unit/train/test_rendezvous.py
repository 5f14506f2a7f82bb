import pytest
from tokar.errors import UserError
from tokar.train.rendezvous import SrunEnvironment, environment

VARIABLES = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.fixture
def started_by(monkeypatch):
    def set_variables(**variables):
        for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", *VARIABLES):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_who_is_who_is_read_off_sruns_variables():
    found = SrunEnvironment(VARIABLES, nodes=2, devices=2)
    assert (found.global_rank(), found.local_rank(), found.node_rank(), found.world_size()) == (3, 1, 1, 4)
    assert (found.main_address, found.main_port) == ("gpu07", 12000 + 4711)
    chosen = SrunEnvironment({**VARIABLES, "MASTER_ADDR": "ib7", "MASTER_PORT": "15000"}, 2, 2)
    assert (chosen.main_address, chosen.main_port) == ("ib7", 15000)


@pytest.mark.parametrize("name", [name for name in VARIABLES if name != "SLURM_STEP_ID"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(UserError, match=f"srun started this process, but {name} is not set; start with `tokar slurm submit`"):
        SrunEnvironment({key: value for key, value in VARIABLES.items() if key != name}, 2, 2)


def test_a_variable_that_is_no_number_is_told():
    with pytest.raises(UserError, match=r"cannot be read: .*'three'"):
        SrunEnvironment({**VARIABLES, "SLURM_PROCID": "three"}, 2, 2)


def test_another_number_of_processes_than_configured_is_refused():
    with pytest.raises(UserError, match="srun started 4 processes on 2 nodes, the strategy has 8 on each of 2"):
        SrunEnvironment(VARIABLES, nodes=2, devices=8)


def test_srun_is_recognised_whatever_the_job_is_called(started_by):
    started_by(**VARIABLES, SLURM_JOB_NAME="bash")
    assert isinstance(environment(2, 2), SrunEnvironment)


def test_one_process_in_a_job_starts_its_ranks_itself(started_by):
    started_by(**{**VARIABLES, "SLURM_STEP_NUM_TASKS": "1"})
    assert type(environment(1, 2)).__name__ == "LightningEnvironment"


def test_torchrun_inside_a_job_is_torchruns(started_by):
    started_by(**VARIABLES, TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", RANK="3")
    assert type(environment(2, 2)).__name__ == "TorchElasticEnvironment"
    with pytest.raises(UserError, match="torchrun started 4 processes, the strategy has 8 on each of 2 nodes"):
        environment(2, 8)


def test_several_nodes_without_a_launcher_are_refused(started_by):
    started_by()
    with pytest.raises(UserError, match=r"strategy.nodes=2: this process was started alone; start with `tokar slurm submit`"):
        environment(2, 1)
    assert environment(1, 2) is None
