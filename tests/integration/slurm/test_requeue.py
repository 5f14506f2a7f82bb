"""A run on two nodes that suffers every event of a cluster ends with the bytes of one that was never stopped."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from minislurm import free_ports
from processes import PRELOAD
from ranks import run_ranks
from tokar.errors import UserError
from tokar.train.lock import Lock

STEPS = 40
RUN = [
    "classifier", "classifier.width=8", "schedule=cosine", "schedule.warmup=4", f"loop.duration={STEPS}", "loop.log_every=1",
    "loop.eval_every=8", "loop.save_every=5", "loop.eval_samples=32", "data.flip=true", "name=run",
]  # fmt: skip
CLUSTER = ["cluster=cpu", "cluster.nodes=2"]


def common(digits):
    return [f"data.path={digits}", "data.image_size=16", "loop.batch_size=8", "strategy.threads=1", "strategy.accelerator=cpu",
            "paths.runs=."]  # fmt: skip


def contents(run):
    """Every file that must not depend on interruptions, by name."""
    kept = [run / "metrics.jsonl", *run.glob("samples/*.png")]
    kept += [path for path in run.glob("checkpoints/step-*/**/*") if path.is_file() and path.name != "COMPLETE"]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in kept}


def steps(run):
    """Steps that `metrics.jsonl` tells of."""
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def step(run):
    return max(steps(run), default=0)


def ranks_of(job):
    """Processes of a job's ranks."""
    mark = f"SLURM_JOB_ID={job}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"python" in words[0] and b"tokar.slurm.rank" in words and mark in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)
        except OSError:
            continue


class Ordeal:
    """A running job of a training run, and what happens to it."""

    def __init__(self, cluster, job, run):
        self.cluster, self.job, self.run = cluster, job, run
        self.log = run / "slurm" / f"{job}.log"
        self.latencies = []

    def restarts(self):
        return int(self.cluster.job(self.job)["Restarts"])

    def after(self, event, beyond):
        """Let an event happen beyond a step; wait until the job is back and has made a step more."""
        self.cluster.until(lambda: step(self.run) >= beyond, 300, f"step {beyond}")
        before = self.restarts()
        event()
        self.cluster.until(lambda: self.restarts() > before, 180, "the requeue")
        asked, was = time.monotonic(), step(self.run)
        self.cluster.until(lambda: self.cluster.job(self.job)["JobState"] == "PENDING" or step(self.run) > was, 60, "its end")
        while step(self.run) <= was:
            assert time.monotonic() < asked + 300, self.log.read_text()
            time.sleep(0.2)
        self.latencies.append(time.monotonic() - asked)

    def usr1(self):
        self.cluster.run("scancel", "-s", "USR1", self.job)

    def preempted(self):
        self.cluster.run("sbatch", "--exclusive", "-N2", "-p", "high", "-o", "/dev/null", "--wrap", "sleep 1")

    def requeued(self):
        self.cluster.run("scontrol", "requeue", self.job)

    def node_down(self):
        node, before = self.cluster.nodes[1], self.restarts()
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        self.cluster.until(lambda: self.restarts() > before, 120, "the requeue")
        self.cluster.resume(node)

    def time_limit(self):
        """The ranks stand still, so that the minute costs nothing; Slurm's warning wakes them."""
        before = self.restarts()
        for process in ranks_of(self.job):
            os.kill(process, signal.SIGSTOP)
        hours, minutes, _ = self.cluster.job(self.job)["RunTime"].split(":")
        self.cluster.run("scontrol", "update", f"jobid={self.job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
        with pytest.raises(UserError, match=f"job {self.job} trains in this run folder"):  # meanwhile a second one comes
            Lock(self.run)
        self.cluster.until(lambda: self.restarts() > before, 240, "the requeue")
        self.cluster.run("scontrol", "update", f"jobid={self.job}", "TimeLimit=UNLIMITED")


@pytest.fixture
def straight(digits, tmp_path_factory):
    """The run that was never stopped, by the same number of ranks."""
    folder = tmp_path_factory.mktemp("straight")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    alone = ["strategy=ddp", "strategy.nodes=1", "strategy.devices=4"]
    run_ranks(server, 4, free_ports(1)[0], [*RUN, *common(digits), *alone], folder)
    return folder / "run"


@pytest.mark.slow
def test_a_run_through_every_event_ends_as_if_there_had_been_none(cluster, login, digits, straight, tmp_path, capsys):
    begun = time.monotonic()
    words = ["slurm", "submit", *RUN, *common(digits), *CLUSTER, "cluster.signal_before=30"]
    said = login(*words)
    job, run = re.search(r"job (\d+) is submitted", said)[1], tmp_path / "run"
    ordeal = Ordeal(cluster, job, run)
    cluster.until(lambda: step(run) >= 1, 300, "the first step")
    latency = time.monotonic() - begun
    for number, event in enumerate(("usr1", "preempted", "requeued", "node_down", "time_limit")):
        ordeal.after(getattr(ordeal, event), 5 + 7 * number)
    assert "RUNNING" in login("slurm", "status", "run")
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", ordeal.log.read_text()

    said = ordeal.log.read_text()
    assert said.count("stopped by a signal and saved; requeued") >= 3  # SIGUSR1, the preemption's, the time limit's
    resumed = [int(found) for found in re.findall(r"going on from \S+ at step (\d+)", said)]
    assert resumed == sorted(resumed)
    assert steps(run) == sorted(steps(run))
    assert not (run / "slurm" / "crashes").exists()
    one, other = contents(straight), contents(run)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and not name.endswith("state.json")] == []

    again = re.search(r"job (\d+) is submitted", login(*words))[1]
    assert cluster.wait(again)["ExitCode"] == "0:0"
    assert f"already finished at step {STEPS}" in (run / "slurm" / f"{again}.log").read_text()
    with capsys.disabled():
        shown = ", ".join(f"{seconds:.1f}" for seconds in ordeal.latencies)
        sys.stdout.write(f"\n4 ranks: submit to first step {latency:.1f} s; requeue to next step {shown} s\n")


@pytest.mark.slow
def test_twenty_signals_at_random_moments_never_hang(cluster, digits, tmp_path, login, capsys):
    """Ranks of a few milliseconds a step; real signals of Slurm, each to be answered by a checkpoint and an end."""
    words = ["classifier", "classifier.width=8", "loop.duration=100000", "loop.log_every=50", "loop.eval_samples=8", "name=run",
             *common(digits), "strategy=ddp", "strategy.nodes=2", "strategy.devices=1"]  # fmt: skip
    program = Path(__file__).parents[2] / "support" / "ranks.py"
    script = tmp_path / "storm.sh"
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {sys.executable} {program} {' '.join(words)}\n")
    variables = f"ALL,MASTER_PORT={free_ports(1)[0]},TOKAR_ENDED={tmp_path}/ended"
    job = cluster.run("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", f"--export={variables}", "-o", "log", script,
                      folder=tmp_path).strip()  # fmt: skip
    log, moments = tmp_path / "log", random.Random(0)

    def stops():
        return re.findall(r"stopped by SIGUSR1 at step (\d+), saved", log.read_text()) if log.exists() else []

    cluster.until(lambda: "ranks have met over gloo" in (log.read_text() if log.exists() else ""), 300, "the first start")
    for number in range(20):
        time.sleep(moments.uniform(0, 1.5))
        asked = time.monotonic()
        while len(stops()) <= number:
            assert time.monotonic() < asked + 120, log.read_text()[-4000:]
            cluster.run("scancel", "-s", "USR1", job)  # again: one that comes between two starts is for nobody
            patience = time.monotonic() + 10
            while len(stops()) <= number and time.monotonic() < patience:
                time.sleep(0.02)
    found = list(map(int, stops()))
    assert found == sorted(found)
    cluster.run("scancel", job)
    with capsys.disabled():
        sys.stdout.write(f"\nstopped at steps {found}\n")
