"""Submissions to a real Slurm: a whole pipeline, torchrun, and what is refused in one line."""

import re
import shutil

import pytest

RUN = ["classifier", "experiment=digits_classifier", "data.image_size=16", "loop.batch_size=8", "loop.eval_samples=16",
       "strategy.threads=1", "name=run", "cluster=cpu"]  # fmt: skip
TINY = ["tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.z_channels=32",
        "discriminator=null", "tokenizer.decoder.blocks=1", "tokenizer.quantizer.codebook_size=32"]  # fmt: skip


def job_of(said):
    return re.search(r"job (\d+) is submitted", said)[1]


@pytest.mark.slow
def test_a_pipeline_submitted_once_ends_with_its_report(cluster, login, digits, tmp_path):
    images = [f"{task}:{key}" for task in ("tokenizer", "codes", "generator", "student", "judge")
              for key in ("data.image_size=16", f"data.path={digits}")]  # fmt: skip
    trained = [f"{task}:{key}" for task in ("tokenizer", "generator", "judge", "student")
               for key in ("loop.duration=4", "loop.batch_size=8", "loop.eval_samples=16")]  # fmt: skip
    said = login(
        "slurm", "pipeline", "experiment=digits_distill", "cluster=cpu", "cluster.tasks_per_node=1", "strategy.accelerator=cpu",
        *images, *trained, *(f"tokenizer:{key}" for key in TINY), "generator:generator.dim=32", "generator:generator.layers=1",
        "generator:generator.heads=2", "pairs:count=32", "pairs:val_count=16", "teacher:count=16", "one_step:count=16",
        "all_steps:count=16",
    )  # fmt: skip
    folders = re.findall(r"^(\S+): job (\d+) is submitted", said, re.MULTILINE)
    assert len(folders) == 6
    last, _ = folders[-1]
    for folder, number in folders:
        log = tmp_path / folder / "slurm" / f"{number}.log"
        assert cluster.wait(number, timeout=600)["JobState"] == "COMPLETED", log.read_text()
    page = (tmp_path / last / "report.html").read_text()
    assert all(f"digits_distill-{name}" in page for name in ("generator", "student"))


@pytest.mark.slow
def test_torchrun_on_each_node_saves_and_goes_on_too(cluster, login, digits, tmp_path):
    words = [*RUN, f"data.path={digits}", "loop.duration=400", "loop.log_every=1", "cluster.launcher=torchrun",
             "cluster.nodes=2", "cluster.tasks_per_node=1"]  # fmt: skip
    job = job_of(login("slurm", "submit", *words))
    run = tmp_path / "runs" / "run"
    cluster.until((run / "metrics.jsonl").exists, 400, "the start")
    cluster.run("scancel", "-s", "USR1", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 120, "the requeue")
    log = run / "slurm" / f"{job}.log"
    cluster.until(lambda: "going on from" in log.read_text(), 400, "the second start")
    login("slurm", "stop", "runs/run")
    assert cluster.wait(job)["ExitCode"] == "75:0"
    said = log.read_text()
    assert "stopped by a signal and saved; requeued" in said
    assert "not requeued: tokar slurm stop asked for it" in said
    assert "SIGTERM" not in said


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["cluster.partition=gpuu"], "tokar: sbatch: invalid partition specified: gpuu; Batch job submission failed: Invalid "
         "partition name specified; set cluster.partition to one that `sinfo` lists"),
        (["cluster.partition=paid"], "the partition paid needs an account; Batch job submission failed: Invalid account or "
         "account/partition combination specified; set cluster.account to one that"),
        (["cluster.constraint=h100"], "submission failed: Invalid feature specification; ask for what the nodes have"),
        (["cluster.gpus_per_node=9"], "Requested node configuration is not available; ask for what the nodes have"),
        (["cluster.time=soon"], "Invalid --time specification; set cluster.time"),
        (["paths.runs=/proc/runs"], "set paths.runs and name to a folder you can write"),
        (["strategy.nodes=4"], "strategy.nodes: is 4, but cluster.nodes makes it 1; leave it out, or set cluster.nodes=4"),
        (["cluster.gpus=4"], "tokar: cluster.gpus: no such key"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted_is_told_in_one_line(cluster, login, asked, line):
    said = login("slurm", "submit", *RUN, *asked, code=2)
    assert line in said
    assert len(said.splitlines()) == 1
    assert said.startswith("tokar: ")


def test_without_slurm_one_line_says_so(login, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    said = login("slurm", "submit", *RUN, code=2)
    assert said == "tokar: sbatch: no such command here; run this on a login node of a Slurm cluster\n"
    said = login("slurm", "status", "runs/run", code=2)
    assert said.startswith("tokar: runs/run: its job was written but not submitted; sbatch ")


def test_a_moved_snapshot_is_told_and_the_job_is_not_tried_again(cluster, login, tmp_path):
    job = job_of(login("slurm", "submit", *RUN, "cluster.sbatch=[--hold]"))
    assert "PENDING (JobHeldUser)" in login("slurm", "status", "runs/run")
    shutil.move(tmp_path / "runs/run/slurm/code", tmp_path / "elsewhere")
    cluster.run("scontrol", "release", job)
    assert cluster.wait(job)["ExitCode"] == "2:0"
    (line,) = (tmp_path / f"runs/run/slurm/{job}.log").read_text().splitlines()
    assert re.fullmatch(r"tokar: .*/code/\w+: the snapshot of the code is gone; submit again with: tokar slurm submit .*", line)
    assert "its job" in login("slurm", "stop", "runs/run", code=2)


def test_a_dry_run_prints_the_script_and_leaves_nothing(login, tmp_path):
    said = login("slurm", "submit", *RUN, "--dry-run")
    assert said.startswith("#!/bin/bash\n")
    assert "#SBATCH --ntasks-per-node=2\n" in said
    assert not (tmp_path / "runs").exists()
