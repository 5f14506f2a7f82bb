"""Sweeps of real runs on this machine: killed and started again, with failures, with Optuna and its pruning."""

import json
import sqlite3
import subprocess
import time

import pytest
from sweeps import command, records, states


def until(condition, process):
    while not condition():
        assert process.poll() is None, "the sweep has ended before"
        time.sleep(0.02)


def starts(folder):
    return [record["starts"] for _, record in sorted(records(folder).items())]


@pytest.mark.slow
def test_a_killed_sweep_runs_what_is_missing_and_no_point_twice(digits, tmp_path):
    folder = tmp_path / "runs/sweeps/local"
    words = command(
        digits, "optim.clip=0", "seed=range(0,7)", "optim.lr=1e-3", "loop.duration=40", "loop.log_every=5",
        "loop.save_every=5", "sweep.parallel=2", "sweep.name=local", "sweep.retries=0",
    )  # fmt: skip
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    until(lambda: folder.exists() and states(folder).count("finished") == 2, killed)
    until(lambda: states(folder).count("running") == 2, killed)
    killed.kill()
    killed.wait()
    before = records(folder)
    finished = [number for number, record in before.items() if record["state"] == "finished"]

    both = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    assert states(folder) == ["finished"] * 7
    again = [number for number, record in records(folder).items() if record["starts"] == 2]
    assert set(again) == {number for number, record in before.items() if record["state"] == "running"}
    assert not set(again) & set(finished)
    for number in range(7):
        environment = json.loads((folder / records(folder)[number]["run"] / "environment.json").read_text())
        assert len(environment["starts"]) <= starts(folder)[number]  # fewer when it was killed while it started


@pytest.mark.slow
def test_optuna_prunes_by_metrics_and_a_killed_study_goes_on(digits, tmp_path):
    folder = tmp_path / "runs/sweeps/tpe"
    words = command(
        digits, "optim.clip=0", "optim.lr=tag(log,interval(1e-6,1e-2))", "loop.duration=300", "loop.log_every=10",
        "loop.eval_every=10", "loop.save_every=100", "sweep=tpe", "sweep/pruning=median", "sweep.pruning.trials=2",
        "sweep.count=4", "sweep.name=tpe",
    )  # fmt: skip
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    until(lambda: folder.exists() and states(folder) == ["finished", "running"], killed)
    killed.kill()
    killed.wait()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(states(folder)) == 4
    assert starts(folder) == [1, 2, 1, 1]
    assert set(states(folder)) == {"finished", "pruned"}, done.stdout
    for number, record in records(folder).items():
        run = folder / record["run"]
        last = max(int(path.name[5:]) for path in run.glob("checkpoints/step-*"))
        assert (last == 300) == (record["state"] == "finished"), number

    study = sqlite3.connect(folder / "study" / "study.db")
    told = dict(study.execute("select number, state from trials").fetchall())
    assert told == {record["trial"]: {"finished": "COMPLETE", "pruned": "PRUNED"}[record["state"]]
                    for record in records(folder).values()}  # fmt: skip
    seen = study.execute("select count(*) from trial_intermediate_values").fetchone()[0]
    assert seen >= 2 * 30
