"""Block diffusion by the command line, on codes of real digits: converted, resumed, sampled, measured."""

import json
import shutil

import numpy as np
import pytest

TOKENIZER = [
    "train", "tokenizer", "name=tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1,1]",
    "tokenizer.encoder.blocks=1", "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32",
    "tokenizer.quantizer.codebook_size=32", "discriminator=null", "loop.duration=10", "loop.batch_size=16",
    "optim.lr=1e-3", "loop.eval_samples=16",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "codes.path=codes", "generator.dim=32", "generator.layers=2", "generator.heads=2", "optim.lr=3e-3",
    "generator.multiple_of=32", "loop.batch_size=32", "loop.log_every=3", "loop.eval_every=12", "loop.eval_samples=64",
    "loop.sample_every=12", "loop.save_every=5", "loop.keep=9", "ema=null",
]  # fmt: skip
COMMON = ["strategy.accelerator=cpu", "strategy.threads=1", "logger.progress=false"]
BLOCK = [*GENERATOR, "generator=block_small", "loop.duration=24", "sampling.steps=2"]


def ran(start, folder, *arguments, code=0):
    command = start(folder, *arguments)
    assert command.wait() == code, command.log.read_text()
    return command.log.read_text()


@pytest.fixture(scope="module")
def place(start, digits, tmp_path_factory):
    """A folder with a tokenizer, the codes of the digits (4x4 tokens), and a next-token model of them."""
    folder = tmp_path_factory.mktemp("blocks")
    data = [f"data.path={digits}", "data.image_size=16"]
    ran(start, folder, *TOKENIZER, *data, *COMMON)
    ran(start, folder, "encode", "runs/tokenizer", "out=codes", *data, "strategy.accelerator=cpu")
    ran(start, folder, *GENERATOR, "generator=llamagen_small", "name=next", "loop.duration=24", *data, *COMMON)
    return folder


def bits(start, place, run, *data):
    ran(start, place, "evaluate", f"runs/{run}", "measure=likelihood", "count=64", "draws=3", "strategy.accelerator=cpu", *data)
    (path,) = (place / "runs" / run / "evaluation").glob("likelihood-*.json")
    return json.loads(path.read_text())


def contents(run):
    kept = [run / "metrics.jsonl", *run.glob("samples/*.png"), *run.glob("checkpoints/step-*/**/*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in kept if path.is_file()}


@pytest.fixture(scope="module")
def data(digits):
    return [f"data.path={digits}", "data.image_size=16"]


def test_a_resumed_run_is_the_straight_one(start, place, data):
    """Masks, levels and the chosen window included."""
    run = place / "runs" / "blocks"
    ran(start, place, *BLOCK, "name=blocks", *data, *COMMON)
    losses = [line["train/loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
    assert losses[-1] < losses[0]
    straight = contents(run)
    for folder in run.glob("checkpoints/step-*"):
        if int(folder.name[5:]) > 15:  # after a validation, before the next
            shutil.rmtree(folder)
    ran(start, place, *BLOCK, "name=blocks", *data, *COMMON)
    assert contents(run) == straight


def test_a_converted_model_begins_as_the_one_it_comes_from(start, place, data):
    """With shift and blocks of one the bits are those of next-token prediction, and on the same axis."""
    more = ["generator.shift=true", "generator.block_size=1", "optim.lr=1e-12", "loop.duration=1", "init_from=runs/next"]
    ran(start, place, *BLOCK, *more, "name=converted", *data, *COMMON)
    before, after = (bits(start, place, run) for run in ("next", "converted"))
    assert after["numbers"]["bits_per_image"] == pytest.approx(before["numbers"]["bits_per_image"], rel=1e-5)
    assert after["numbers"]["bits_per_image_error"] == pytest.approx(0, abs=1e-6)
    assert after["protocol_id"] == before["protocol_id"]
    assert (before["subject"]["likelihood"], after["subject"]["likelihood"]) == ("exact", "upper bound")
    assert before["protocol"]["draws"] == 3


def test_samples_with_and_without_a_cache(start, place):
    drawn = {}
    how = ["sampling.guidance=linear:3", "sampling.reveal=maskgit", "sampling.steps=2", "save=[codes]", "count=20"]
    for cache in ("true", "false"):
        more = [f"sampling.cache={cache}", f"out=drawn-{cache}", "strategy.accelerator=cpu"]
        said = ran(start, place, "sample", "runs/blocks", *how, *more)
        # the class, 4 blocks of 2 steps, and two where the unconditional half joins after the first block, which must be done
        assert f"{11 if cache == 'true' else 8} network calls (" in said
        drawn[cache] = np.load(place / f"drawn-{cache}" / "codes.npy")
    assert drawn["true"].shape == (20, 16)
    assert np.array_equal(drawn["true"], drawn["false"])


def test_mistakes(start, place, data):
    said = ran(start, place, "sample", "runs/next", "sampling.steps=4", code=2)
    assert "a NextToken reveals a unit in one step" in said
    said = ran(start, place, *BLOCK, "name=bad", "sampling.threshold=0.5", *data, *COMMON, code=2)
    assert "reveal=confidence does not read it" in said
    said = ran(start, place, *BLOCK, "name=worse", "generator.block_size=2", "generator.block=scales", *data, *COMMON, code=2)
    assert "a grid has no scales" in said
    said = ran(start, place, "evaluate", "runs/tokenizer", "measure=likelihood", code=2)
    assert "measure=likelihood: not for a" in said
