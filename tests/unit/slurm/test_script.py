import subprocess
from pathlib import Path

import pytest
from tokar.conf.compose import compose, groups
from tokar.slurm.script import Job, Task, fill, render
from tokar.slurm.submit import plan

TRAINING = Task(("tokenizer", "name=a b"), Path("/runs/a b"))


def script(*overrides, tasks=(TRAINING,)):
    cluster = compose("slurm", overrides).typed.cluster
    job = Job("a b", Path("/runs/a b/slurm"), tasks, cluster, ["slurm", "submit", "tokenizer", "name=a b"])
    return render(job, Path("/code"), Path("/home/me"))


def options(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_lines_without_a_value_are_left_out_and_lists_make_lines():
    values = {"a": 1, "b": None, "c": ["x", "y"], "d": [], "e": 0}
    assert fill("a={{a}}\nb={{b}}\nc={{c}} {{a}}\nd={{d}}\ne={{e}}\n", values) == "a=1\nc=x 1\nc=y 1\ne=0\n"


def test_every_option_of_sbatch_follows_the_preset():
    found = options(script("cluster=nodes4x8", "cluster.partition=p", "cluster.gpu_type=h100", "cluster.constraint=ib"))
    assert found == [
        "--job-name='a b'", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--cpus-per-task=8", "--mem=0",
        "--partition=p", "--constraint=ib", "--time=24:00:00", "--signal=USR1@120", "--requeue", "--open-mode=append",
        "--chdir=/home/me", "--output='/runs/a b/slurm'/%j.log", "--exclusive",
    ]  # fmt: skip


def test_torchrun_is_one_process_on_each_node_with_the_cores_of_all():
    text = script("cluster=torchrun4x8")
    assert {"--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(options(text))
    assert text.rstrip().endswith("run ranks \"$python\" -m tokar.slurm.node 8 tokenizer 'name=a b'")


def test_modules_variables_and_lines_of_shell_come_before_the_start():
    text = script(
        "cluster=gpu",
        "cluster.modules=[cuda]",
        "cluster.setup=['ulimit -l unlimited']",
        "+cluster.environment.NCCL_DEBUG='a b'",
    )
    order = [
        text.index(part) for part in ("export NCCL_DEBUG='a b'\n", "module load cuda\n", "ulimit -l unlimited\n", "run ranks")
    ]
    assert order == sorted(order)


def test_a_container_sees_the_working_directory_and_the_run_folder():
    text = script("cluster=container8")
    assert "'--container-image=nvcr.io#nvidia/pytorch:25.06-py3' --container-workdir=/home/me" in text
    assert "'--container-mounts=/home/me:/home/me,/runs/a b:/runs/a b'" in text


def test_an_evaluation_uses_all_ranks_where_its_images_can_be_dealt_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cluster = compose("slurm", ["cluster=nodes4x8"]).typed.cluster
    asked = (["target=runs/a"], ["target=runs/a", "measure=prefixes"], ["target=runs/a", "probe=linear"])
    lines = script("cluster=nodes4x8", tasks=[plan("evaluate", words, cluster) for words in asked]).splitlines()[-3:]
    rank = '"$python" -m tokar.slurm.rank evaluate target=runs/a'
    assert lines == [
        f"run ranks {rank} strategy=ddp strategy.nodes=4 strategy.devices=8",
        f"run once {rank} measure=prefixes",
        f"run once {rank} probe=linear",
    ]


@pytest.mark.parametrize("preset", groups()["cluster"])
def test_every_preset_makes_a_script_that_bash_can_read(preset):
    subprocess.run(["bash", "-n"], input=script(f"cluster={preset}"), text=True, check=True)


def run_script(tmp_path, srun, **files):
    """Run a script with commands of Slurm that only play their part; returns the exit code, what it said, and its folder."""
    state, programs, code = tmp_path / "slurm", tmp_path / "bin", tmp_path / "code" / "tokar" / "slurm"
    for folder in (state, programs, code):
        folder.mkdir(parents=True, exist_ok=True)
    (code / "rank.py").touch()
    for name, text in {"srun": srun, "scontrol": f'echo "$@" >>{tmp_path}/requeued'}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    for name, text in files.items():
        (state / name).write_text(text)
    cluster = compose("slurm", ["cluster=cpu"]).typed.cluster
    text = render(Job("run", state, [Task(("classifier",), state.parent)], cluster, ["slurm"]), code.parents[1], tmp_path)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, state


def requeued(tmp_path):
    return (tmp_path / "requeued").exists()


def test_a_run_that_ends_well_is_not_requeued(tmp_path):
    assert run_script(tmp_path, "exit 0")[:2] == (0, "")
    assert not requeued(tmp_path)


def test_a_run_that_saved_is_requeued_whatever_srun_returns(tmp_path):
    for code in (0, 143):
        ended, said, state = run_script(tmp_path, f"echo 75 >$TOKAR_ENDED; exit {code}")
        assert ended == 0
        assert "stopped by a signal and saved; requeued" in said
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
        (tmp_path / "requeued").unlink()
    assert not (state / "crashes").exists()


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    ended, said, _ = run_script(tmp_path, "echo 2 >$TOKAR_ENDED; exit 143")
    assert ended == 2
    assert "the same command would end the same way" in said
    assert not requeued(tmp_path)


def test_a_crash_is_requeued_as_often_as_allowed(tmp_path):
    for crash in (1, 2, 3):
        ended, said, state = run_script(tmp_path, "exit 137")
        assert ended == 0
        assert f"crash {crash} of 3 (exit code 137); requeued" in said
        assert (state / "crashes").read_text() == f"{crash}\n"
    (tmp_path / "requeued").unlink()
    ended, said, _ = run_script(tmp_path, "exit 137")
    assert ended == 137
    assert "crash 4 (exit code 137); not requeued: more than cluster.max_crashes=3" in said
    assert not requeued(tmp_path)


def test_a_run_that_was_asked_to_stop_is_not_requeued_and_holds_up_what_waits_for_it(tmp_path):
    ended, said, _ = run_script(tmp_path, "echo 75 >$TOKAR_ENDED", stop="")
    assert ended == 75
    assert "not requeued: tokar slurm stop asked for it" in said
    assert not requeued(tmp_path)
