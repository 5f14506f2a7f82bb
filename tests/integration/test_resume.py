"""A run killed with SIGKILL at any moment and started again ends with the bytes of a run that was never stopped."""

import random
import time

import pytest

KILLS = 10

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "tokenizer.quantizer.restart_after=3", "discriminator.width=8", "discriminator.layers=1", "losses.adversarial_start=6",
    "losses.adaptive=true", "schedule=cosine", "schedule.warmup=4", "loop.accumulate=2",
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
    command = start(runs, *TOKENIZER, *spine(digits, 24))
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


def interrupted(start, folder, arguments, seed):
    """Start and kill until `KILLS` kills have hit a living run, some while a checkpoint is being written; then let it end."""
    moments, run = random.Random(seed), folder / "run"
    kills = torn = attempts = 0
    while kills < KILLS:
        attempts += 1
        assert attempts < 4 * KILLS, "the run ends before it can be killed: make it longer"
        command = start(folder, *arguments)
        if kills % 3 == 2:
            hit = command.kill_when(lambda: unfinished(run))
        else:
            # from the imports to a few steps in: every part of a start and of a step is hit now and then
            time.sleep(moments.uniform(0.0, 0.4))
            begun = time.monotonic() + moments.uniform(0.0, 1.0)
            hit = command.kill_when(lambda end=begun: time.monotonic() > end)
        kills += hit
        torn += unfinished(run)
        if not hit:
            assert command.wait() == 0
            break
    assert torn >= 1, "no kill hit a checkpoint being written"
    command = start(folder, *arguments)
    assert command.wait() == 0, command.log.read_text()
    return kills


@pytest.mark.slow
def test_tokenizer_with_discriminator(start, digits, tokenizer_run, tmp_path):
    kills = interrupted(start, tmp_path, [*TOKENIZER, *spine(digits, 24)], seed=0)
    assert kills == KILLS
    same(tokenizer_run, tmp_path / "run")


@pytest.mark.slow
def test_generator_from_images(start, digits, tokenizer_run, tmp_path):
    arguments = [*GENERATOR, f"codes.tokenizer={tokenizer_run}", *spine(digits, 40)]
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = start(tmp_path / "straight", *arguments)
    assert straight.wait() == 0, straight.log.read_text()
    kills = interrupted(start, tmp_path / "killed", arguments, seed=1)
    assert kills == KILLS
    same(tmp_path / "straight" / "run", tmp_path / "killed" / "run")


def test_a_finished_run_says_so_and_changes_nothing(start, digits, tokenizer_run):
    before = contents(tokenizer_run)
    command = start(tokenizer_run.parent, *TOKENIZER, *spine(digits, 24))
    assert command.wait() == 0
    assert "already finished at step 24" in command.log.read_text()
    assert contents(tokenizer_run) == before


def test_another_config_in_the_same_folder_is_refused(start, digits, tokenizer_run):
    before = contents(tokenizer_run)
    command = start(tokenizer_run.parent, *TOKENIZER, *spine(digits, 24), "optim.lr=0.5")
    assert command.wait() == 2
    assert "optim.lr: 0.0001 → 0.5" in command.log.read_text()
    assert contents(tokenizer_run) == before


def test_a_signal_stops_at_a_step_boundary_and_the_run_goes_on(start, digits, tokenizer_run, tmp_path):
    import os
    import signal

    arguments = [*TOKENIZER, *spine(digits, 24)]
    command = start(tmp_path, *arguments)
    while not any((tmp_path / "run").glob("checkpoints/step-*")):
        assert command.process.is_alive(), command.log.read_text()
        time.sleep(0.02)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait() == 75, command.log.read_text()
    assert "stopped by SIGTERM" in command.log.read_text()
    assert start(tmp_path, *arguments).wait() == 0
    same(tokenizer_run, tmp_path / "run")
