"""The cluster of these tests is a real one: jobs run on two nodes, a sleeper is preempted and comes back."""

import subprocess

import pytest
from minislurm import Unavailable, fetch


def test_a_job_runs_on_two_nodes(cluster, tmp_path):
    said = cluster.run("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c",
                       "echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_JOB_NODELIST $SLURM_GPUS_ON_NODE")  # fmt: skip
    assert sorted(said.splitlines()) == [f"{task} 127.0.0.1{1 + task // 2} 127.0.0.[11-12] 2" for task in range(4)]


def test_where_apt_knows_no_such_packages_the_reason_is_told(tmp_path, monkeypatch):
    answer = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package slurmctld\n")
    monkeypatch.setattr("minislurm._apt", lambda *_: answer)
    with pytest.raises(Unavailable, match="Slurm's packages cannot be had: E: Unable to locate package slurmctld"):
        fetch(tmp_path)
