"""RAR, NAR and PAR by the command line, on codes of real digits: trained, resumed, sampled with and without a cache."""

import json
import shutil

import numpy as np
import pytest

STEPS, RESUMED = 24, 15
TOKENIZER = [
    "train", "tokenizer", "name=tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1,1]",
    "tokenizer.encoder.blocks=1", "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32",
    "tokenizer.quantizer.codebook_size=32", "discriminator=null", "loop.duration=10", "loop.batch_size=16",
    "optim.lr=1e-3", "loop.eval_samples=16",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "codes.path=codes", "generator.dim=32", "generator.layers=2", "generator.heads=2", "optim.lr=3e-3",
    f"loop.duration={STEPS}", "loop.batch_size=32", "loop.log_every=3", "loop.eval_every=12", "loop.eval_samples=32",
    "loop.sample_every=12", "loop.save_every=5", "loop.keep=9", "sampling.guidance=linear:3",
]  # fmt: skip
COMMON = ["strategy.accelerator=cpu", "strategy.threads=1", "logger.progress=false"]
FAMILIES = pytest.mark.parametrize("family", ["rar", "nar", "par"])


def ran(start, folder, *arguments):
    command = start(folder, *arguments)
    assert command.wait() == 0, command.log.read_text()


@pytest.fixture(scope="module")
def place(start, digits, tmp_path_factory):
    """A folder with a tokenizer and the codes of the digits: 4x4 tokens."""
    folder = tmp_path_factory.mktemp("families")
    data = [f"data.path={digits}", "data.image_size=16"]
    ran(start, folder, *TOKENIZER, *data, *COMMON)
    ran(start, folder, "encode", "runs/tokenizer", "out=codes", *data, "strategy.accelerator=cpu")
    return folder


@pytest.fixture(scope="module")
def train(start, place):
    """Trains a family's small network, or goes on where it was; returns its run folder."""

    def run(family):
        ran(start, place, *GENERATOR, f"generator={family}_small", f"name={family}", *COMMON)
        return place / "runs" / family

    return run


def contents(run):
    kept = [run / "metrics.jsonl", *run.glob("samples/*.png"), *run.glob("checkpoints/step-*/**/*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in kept if path.is_file()}


@FAMILIES
def test_trains_resumes_and_samples(start, place, train, family):
    run = train(family)
    losses = [line["train/loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.2

    straight = contents(run)
    for folder in run.glob("checkpoints/step-*"):  # as after a crash: RAR is then in the middle of its annealing
        if int(folder.name[5:]) > RESUMED:
            shutil.rmtree(folder)
    assert contents(train(family)) == straight

    drawn = {}
    guided = ["sampling.guidance={kind: power_cosine, value: 4, power: 2}", "save=[codes]", "count=20"]
    for cache in ("true", "false"):
        more = [f"sampling.cache={cache}", f"out=drawn-{family}-{cache}", "strategy.accelerator=cpu"]
        ran(start, place, "sample", f"runs/{family}", *guided, *more)
        drawn[cache] = np.load(place / f"drawn-{family}-{cache}" / "codes.npy")
    assert drawn["true"].shape == (20, 16)
    assert np.array_equal(drawn["true"], drawn["false"])
