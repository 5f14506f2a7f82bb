"""A sweep as an array of jobs: nobody has to watch it, and what was killed is all that runs again."""

import os
import re
import signal
import subprocess
import sys

import pytest
from sweeps import command, final, records, states


@pytest.mark.slow
def test_an_array_goes_on_without_its_controller_and_runs_again_what_was_killed(cluster, digits, tmp_path):
    folder = tmp_path / "runs/sweeps/array"
    words = command(
        digits, "optim.clip=0", "optim.lr=1e-3,1e-2,3e-2,1e30", "seed=0,1", "loop.duration=6", "loop.save_every=2",
        "loop.log_every=2",
        "sweep.backend=slurm", "cluster=cpu", "cluster.tasks_per_node=1", "sweep.parallel=3", "sweep.retries=0",
        "sweep.name=array",
    )  # fmt: skip

    def arrays():
        return {line.split()[0].partition("_")[0] for line in queue()}

    def queue():
        return cluster.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T", folder=tmp_path).splitlines()

    before = arrays()
    controller = subprocess.Popen(
        words, cwd=tmp_path, env=cluster.environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    cluster.until(lambda: arrays() - before, 120, "an array")
    os.killpg(controller.pid, signal.SIGKILL)  # the moment that Slurm has the array, before or after it says so
    controller.wait()
    (job,) = arrays() - before
    cluster.until(lambda: {"running"} == set(states(folder)[:2]), 120, "two points to run")
    cluster.run("scancel", "-s", "KILL", "--full", f"{job}_0", f"{job}_1")
    again = subprocess.run(words, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    cluster.until(
        lambda: not [line for line in queue() if re.search("PENDING|RUNNING|COMPLETING", line)], 300, "the jobs to end"
    )

    assert states(folder) == ["finished"] * 6 + ["failed"] * 2
    assert [record["starts"] for _, record in sorted(records(folder).items())] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert re.search(r"#SBATCH --array=0-1%3\n", (folder / "array.sbatch").read_text())
    for number, record in records(folder).items():
        if record["state"] == "failed":
            assert "the loss is nan" in record["tail"][-1]
            (log,) = folder.glob(f"logs/job-*_{number}.log")
            assert f"point {number} failed (exit code 2" in log.read_text()
            assert "the loss is nan" in log.read_text()

    def tokar(*more):
        return cluster.run(sys.executable, "-m", "tokar.cli", "sweep", *more, str(folder), folder=tmp_path)

    values = {number: final(folder, number) for number in range(6)}
    assert tokar("best").split()[1] == str(min(values, key=values.get))
    status = tokar("status")
    assert status.count("finished ") == 6
    assert "point 7 failed" in status
    assert "the loss is nan" in status
