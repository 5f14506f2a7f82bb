import json
import os
import subprocess
import sys
import time

import pytest
from tokar.errors import UserError
from tokar.train.lock import OWNER_NAME, STALE, Lock

ELSEWHERE = {"pid": 1, "host": "gpu07", "boot": "another", "job": None}


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Slurm's word on every job."""

    def answer(text, code=0):
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\necho '{text}'{' >&2' if code else ''}\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return answer


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def owned_by(run, age=0.0, **owner):
    file = run / OWNER_NAME
    file.write_text(json.dumps({**ELSEWHERE, **owner}))
    os.utime(file, (time.time() - age, time.time() - age))


def test_two_of_this_machine_exclude_one_another_until_the_first_is_gone(run):
    first = Lock(run)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* trains in this run folder; wait for it"):
        Lock(run)
    del first
    assert not (run / OWNER_NAME).exists()
    Lock(run)


def test_a_killed_process_does_not_hold_it(run):
    code = (
        f"from pathlib import Path; from tokar.train.lock import Lock; a = Lock(Path({str(run)!r})); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.kill()
    assert (run / OWNER_NAME).exists()
    Lock(run)


@pytest.mark.parametrize(
    ("said", "code"), [("COMPLETED", 0), ("NODE_FAIL", 0), ("", 0), ("slurm_load_jobs error: Invalid job id", 1)]
)
def test_a_job_that_ended_on_another_node_does_not_hold_it(run, squeue, said, code):
    squeue(said, code)
    owned_by(run, job="7")
    lock = Lock(run)
    assert json.loads((lock.folder / OWNER_NAME).read_text())["pid"] == os.getpid()


def test_a_job_that_runs_on_another_node_holds_it_however_old_its_sign_of_life(run, squeue):
    squeue("RUNNING")
    owned_by(run, age=10 * STALE, job="7")
    with pytest.raises(UserError, match=r"job 7 trains in this run folder; wait for it, stop it \(tokar slurm stop"):
        Lock(run)
    assert json.loads((run / OWNER_NAME).read_text())["job"] == "7"


def test_a_job_that_was_requeued_to_another_node_finds_its_folder_free(run, squeue, monkeypatch):
    squeue("RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    owned_by(run, job="7")
    Lock(run)


@pytest.mark.parametrize("job", [None, "7"])
def test_where_slurm_cannot_be_asked_the_sign_of_life_counts(run, squeue, job):
    squeue("slurm_load_jobs error: Unable to contact slurm controller", 1)
    owned_by(run, job=job)
    with pytest.raises(UserError, match="trains in this run folder"):
        Lock(run)
    owned_by(run, age=STALE + 5, job=job)
    Lock(run)


def test_a_damaged_name_that_is_old_holds_nothing(run):
    (run / OWNER_NAME).write_text("{")
    os.utime(run / OWNER_NAME, (0, 0))
    Lock(run)
