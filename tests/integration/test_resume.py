"""A run killed with SIGKILL at any moment and started again ends with the bytes of a run that was never stopped."""

import random
import time

import pytest

KILLS, STEPS = 10, 44

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "tokenizer.quantizer.restart_after=3", "discriminator.width=8", "discriminator.layers=1", "losses.adversarial_start=6",
    "losses.adaptive=true", "losses.adversarial_warmup=9", "losses.lecam_weight=0.1", "losses.lecam_decay=0.9",
    "losses.r1_weight=0.05", "losses.r1_every=3", "schedule=cosine", "schedule.warmup=4", "loop.accumulate=2",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "generator.dim=32", "generator.layers=2", "generator.heads=2", "generator.multiple_of=32",
    "generator.token_dropout=0.2", "class_dropout=0.3", "optim.lr=1e-3",
]  # fmt: skip


def spine(digits, steps):
    return [
        f"data.path={digits}", "data.image_size=16", f"loop.duration={steps}", "loop.batch_size=8",
        "loop.log_every=3", "loop.eval_every=8", "loop.eval_samples=32", "loop.sample_every=10", "loop.save_every=2",
        "loop.keep=2", "strategy.threads=1", "strategy.accelerator=cpu", "paths.runs=.", "name=run",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_run(start, digits, tmp_path_factory):
    """A finished tokenizer run that was never stopped."""
    runs = tmp_path_factory.mktemp("straight")
    command = start(runs, *TOKENIZER, *spine(digits, STEPS))
    assert command.wait() == 0, command.log.read_text()
    return runs / "run"


def contents(run):
    """Every file that must not depend on interruptions, by name."""
    kept = [run / "metrics.jsonl", run / "config.yaml", *run.glob("samples/*.png")]
    kept += [path for path in run.glob("checkpoints/step-*/**/*") if path.is_file()]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in kept}


def same(straight, killed):
    one, other = contents(straight), contents(killed)
    assert one.keys() == other.keys()
    different = [name for name in one if one[name] != other[name]]
    assert not different


def unfinished(run):
    return any((run / "checkpoints").glob(".step-*"))


def newest_step(run):
    """Step of the newest complete checkpoint, 0 without one."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/COMPLETE")), default=0)


def interrupted(start, folder, arguments, seed):
    """Start and kill, `KILLS` times, then let the run end. Every kill hits a living process, at one of three moments:

    while it starts; within a step, some checkpoints later; while a checkpoint is being written. Returns the steps that
    the run was resumed from.
    """
    moments, run = random.Random(seed), folder / "run"
    torn, resumed = 0, set()
    for kill in range(KILLS):
        before = newest_step(run)
        resumed.add(before)
        command = start(folder, *arguments)
        if kill % 5 == 0:
            time.sleep(moments.uniform(0.0, 1.5))
        else:
            goal = before + moments.choice([2, 4])
            assert command.kill_when(
                lambda goal=goal, anywhere=kill % 2: newest_step(run) >= goal and (anywhere or unfinished(run)), moments
            ), command.log.read_text()
        command.kill()
        torn += unfinished(run)
    assert torn, "no kill hit a checkpoint being written"
    command = start(folder, *arguments)
    assert command.wait() == 0, command.log.read_text()
    return resumed | {newest_step(run)}


@pytest.mark.slow
def test_tokenizer_with_discriminator(start, digits, tokenizer_run, tmp_path):
    resumed = interrupted(start, tmp_path, [*TOKENIZER, *spine(digits, STEPS)], seed=0)
    assert len(resumed) >= 6
    same(tokenizer_run, tmp_path / "run")


@pytest.mark.slow
def test_generator_from_images(start, digits, tokenizer_run, tmp_path):
    arguments = [*GENERATOR, f"codes.tokenizer={tokenizer_run}", *spine(digits, STEPS)]
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = start(tmp_path / "straight", *arguments)
    assert straight.wait() == 0, straight.log.read_text()
    resumed = interrupted(start, tmp_path / "killed", arguments, seed=1)
    assert len(resumed) >= 6
    same(tmp_path / "straight" / "run", tmp_path / "killed" / "run")


def test_a_finished_run_says_so_and_changes_nothing(start, digits, tokenizer_run):
    before = contents(tokenizer_run)
    command = start(tokenizer_run.parent, *TOKENIZER, *spine(digits, STEPS))
    assert command.wait() == 0
    assert "already finished at step 44" in command.log.read_text()
    assert contents(tokenizer_run) == before


def test_another_config_in_the_same_folder_is_refused(start, digits, tokenizer_run):
    before = contents(tokenizer_run)
    command = start(tokenizer_run.parent, *TOKENIZER, *spine(digits, STEPS), "optim.lr=0.5")
    assert command.wait() == 2
    assert "optim.lr: 0.0001 → 0.5" in command.log.read_text()
    assert contents(tokenizer_run) == before


def test_a_signal_stops_at_a_step_boundary_and_the_run_goes_on(start, digits, tokenizer_run, tmp_path):
    import os
    import signal

    arguments = [*TOKENIZER, *spine(digits, STEPS)]
    command = start(tmp_path, *arguments)
    while not any((tmp_path / "run").glob("checkpoints/step-*")):
        assert command.process.is_alive(), command.log.read_text()
        time.sleep(0.02)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait() == 75, command.log.read_text()
    assert "stopped by SIGTERM" in command.log.read_text()
    assert start(tmp_path, *arguments).wait() == 0
    same(tokenizer_run, tmp_path / "run")
