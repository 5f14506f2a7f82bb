"""The job script under every event of a real Slurm, with ranks of a few lines of shell: what is requeued and what is not."""

import json
import re
import time

import pytest

RANK = """#!/bin/bash
echo "start $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, restart ${SLURM_RESTART_COUNT:-0}"
trap 'echo 75 >"$TOKAR_ENDED"; exit 0' USR1 TERM
while [ ! -e finish ]; do sleep 0.2; done
"""
SAVED = "tokar: stopped by a signal and saved; requeued"


@pytest.fixture
def job(cluster, login, tmp_path):
    """A job of two nodes with two ranks each."""
    rank = tmp_path / "rank"
    rank.write_text(RANK)
    rank.chmod(0o755)
    said = login("slurm", "submit", "classifier", "experiment=digits_classifier", "cluster=cpu", "cluster.nodes=2", "name=run",
                 f"cluster.python={rank}", "cluster.signal_before=30")  # fmt: skip
    return Watched(cluster, re.search(r"job (\d+) is submitted", said)[1], tmp_path / "runs" / "run" / "slurm")


class Watched:
    def __init__(self, cluster, number, state):
        self.cluster, self.number, self.state = cluster, number, state

    @property
    def log(self):
        return (self.state / f"{self.number}.log").read_text()

    def started(self, restart):
        """Wait until all four ranks of a start are there."""
        self.cluster.until(lambda: self.log.count(f"of 4, restart {restart}\n") == 4, 120, f"start {restart}")

    def restarts(self):
        return int(self.cluster.job(self.number)["Restarts"])


@pytest.mark.slow
def test_every_event_is_answered_with_a_requeue(cluster, job, login, tmp_path, capsys):
    run, waits = cluster.run, {}

    def after(name, restart, *command):
        begun = time.monotonic()
        run(*command)
        cluster.until(lambda: job.restarts() == restart, 200, f"the requeue after {name}")
        if name == "node failure":
            cluster.resume(cluster.nodes[1])
        if name == "time limit":
            run("scontrol", "update", f"jobid={job.number}", "TimeLimit=UNLIMITED")
        job.started(restart)
        waits[name] = time.monotonic() - begun

    cluster.until(lambda: (job.state / f"{job.number}.log").exists(), 60, "the start")
    job.started(0)
    after("USR1", 1, "scancel", "-s", "USR1", job.number)
    assert job.log.count(SAVED) == 1
    after("preemption", 2, "sbatch", "--exclusive", "-N2", "-p", "high", "-o", "/dev/null", "--wrap", "sleep 1")
    assert job.log.count(SAVED) == 2
    after("scontrol requeue", 3, "scontrol", "requeue", job.number)
    after("node failure", 4, "scontrol", "update", f"nodename={cluster.nodes[1]}", "state=down", "reason=test")
    after("time limit", 5, "scontrol", "update", f"jobid={job.number}", "TimeLimit=1")
    assert job.log.count(SAVED) == 3
    assert not (job.state / "crashes").exists()
    run("scancel", "-s", "KILL", f"{job.number}.0")
    job.started(6)
    assert "tokar: crash 1 of 3 (exit code 137); requeued" in job.log
    assert (job.state / "crashes").read_text() == "1\n"
    (tmp_path / "finish").touch()
    assert cluster.wait(job.number)["ExitCode"] == "0:0"
    with capsys.disabled():
        print("\nevent to next start of all ranks:", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in waits.items()))


@pytest.mark.slow
def test_stop_and_scancel_are_not_answered_with_a_requeue(cluster, job, login):
    cluster.until(lambda: (job.state / f"{job.number}.log").exists(), 60, "the start")
    job.started(0)
    assert "saves and ends" in login("slurm", "stop", "runs/run")
    assert cluster.wait(job.number)["ExitCode"] == "75:0"
    assert "not requeued: tokar slurm stop asked for it" in job.log
    login("slurm", "requeue", "runs/run")  # it has ended: submitted anew
    job.number = json.loads((job.state / "jobs.jsonl").read_text().splitlines()[-1])["job"]
    cluster.until(lambda: (job.state / f"{job.number}.log").exists(), 60, "the start")
    job.started(0)
    login("slurm", "stop", "runs/run", "--now")
    assert cluster.wait(job.number)["JobState"] == "CANCELLED"
    time.sleep(2)
    assert cluster.job(job.number)["JobState"] == "CANCELLED"
