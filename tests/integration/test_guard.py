"""Two ranks over gloo: poisoned batches and a spike, ranks that are killed, a rank that hangs."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "tokenizer.quantizer.restart_after=3", "discriminator.width=8", "discriminator.layers=1", "losses.adversarial_start=2",
    "losses.lecam_weight=0.1", "losses.lecam_decay=0.9", "data.image_size=16", "loop.duration=24", "loop.batch_size=8",
    "loop.log_every=2", "loop.eval_samples=16", "loop.save_every=5", "strategy=ddp", "strategy.devices=2",
    "strategy.accelerator=cpu", "strategy.threads=1", "guard.spike=20", "guard.warmup=6", "paths.runs=.", "name=run",
]  # fmt: skip
FAULTS = "nan@11,12,13 spike@20"
PATIENCE = 300
"""Seconds that a busy machine may take over what should take seconds."""


class Pair:
    """A command and the rank that it starts."""

    def __init__(self, folder, faults, *arguments):
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / f"{len(list(folder.glob('*.log')))}.log"
        self.seen = self.steps()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "FAULTS": faults}
        script = str(Path(__file__).parents[1] / "support" / "faulty.py")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, script, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
            )

    def steps(self):
        """How many steps rank 1 has begun, in all that ran in this folder."""
        file = self.folder / "weights-1.txt"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def other(self):
        """Process of rank 1."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(next(pid for pid in children if "faulty.py" in Path(f"/proc/{pid}/cmdline").read_text()))

    def wait(self):
        try:
            return self.process.wait(timeout=500)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(self.said())

    def said(self):
        return self.log.read_text()

    def kill(self, rank, when, moments):
        """SIGKILL a rank some time after `when` holds; true when both are gone soon after."""
        until(lambda: when() or self.process.poll() is not None)
        time.sleep(moments.uniform(0, 0.05))
        both = self.process.pid, self.other()
        os.kill(both[rank], 9)
        until(lambda: self.process.poll() is not None and not lives(both[1]))
        return True


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def lives(pid):
    """Whether a process still does anything; nobody may have asked yet how it ended."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def events(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines() if (folder / "run" / "metrics.jsonl").exists() else []
    return [line for line in map(json.loads, lines) if "event" in line]


def contents(folder):
    kept = [folder / "run" / "metrics.jsonl", *(folder / "run" / "checkpoints").glob("step-*/**/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept if path.is_file()}


def were_left_behind(command):
    """The poisoned batches and the spike of `FAULTS`, on both ranks."""
    told = [(line["event"], line["step"], line["samples"]) for line in events(command.folder)]
    assert told == [("skip", 12, 96), ("skip", 13, 104), ("skip", 14, 112), ("rollback", 14, 112), ("skip", 17, 168)]
    assert "run: step 14: 3 steps in a row went wrong; back to step 10, with the data that follow" in command.said()
    assert "spreads above its mean" in events(command.folder)[-1]["reason"]
    for rank in (0, 1):
        weights = [line.split()[1] for line in (command.folder / f"weights-{rank}.txt").read_text().splitlines()]
        assert weights[11] == weights[12] == weights[13]  # before the steps with poisoned batches
        assert weights[14] == weights[10]  # back
        assert weights[20] == weights[21] != weights[22]  # the spike, into which the codebook had been moved


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_bad_batches_are_left_behind_in_shards(strategy, digits, tmp_path):
    ranks = [f"strategy={strategy}", "strategy.devices=2", "guard.hang_after=40"]
    command = Pair(tmp_path, FAULTS, *TOKENIZER, *ranks, f"data.path={digits}")
    ended = command.wait()  # a rank that hangs says where before that gives up
    assert ended == 0, command.said() + "".join(path.read_text() for path in (tmp_path / "run/hang").glob("*"))
    were_left_behind(command)


@pytest.mark.slow
def test_bad_batches_are_left_behind_also_when_ranks_are_killed_meanwhile(digits, tmp_path):
    arguments = [*TOKENIZER, f"data.path={digits}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = Pair(straight, FAULTS, *arguments)
    assert command.wait() == 0, command.said()
    were_left_behind(command)
    ranks = [(straight / f"weights-{rank}.txt").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]

    moments = random.Random(0)
    command = Pair(killed, FAULTS, *arguments)
    assert command.kill(1, lambda: any(line["event"] == "rollback" for line in events(killed)), moments)
    assert command.process.returncode == 69
    assert "tokar: rank 1 was killed by SIGKILL; the run ends with it\n" in command.said()
    assert "Traceback" not in command.said()
    more = moments.randrange(2, 8)
    command = Pair(killed, FAULTS, *arguments)
    assert command.kill(0, lambda: command.steps() >= command.seen + more, moments)
    assert "run: going on from run/checkpoints/step-00000010 at step 10" in command.said()
    command = Pair(killed, FAULTS, *arguments)
    assert command.wait() == 0, command.said()
    assert contents(straight) == contents(killed)


@pytest.mark.slow
def test_a_rank_that_hangs_is_reported_with_all_stacks(digits, tmp_path):
    command = Pair(tmp_path, "hang@3", *TOKENIZER, f"data.path={digits}", "guard.hang_after=6")
    assert command.wait() == 124, command.said()
    report = (tmp_path / "run" / "hang" / "report.txt").read_text().splitlines()
    assert report[0] == "no step for 6 s; all stacks are in run/hang, guard.hang_after=… allows more"
    assert report[1].startswith("rank 0 is in ")
    assert report[2].startswith("rank 1 is in step (faulty.py:")
    assert all(f"tokar: {line}\n" in command.said() for line in report)
    assert "loop.py" in (tmp_path / "run" / "hang" / "rank-0.txt").read_text()
