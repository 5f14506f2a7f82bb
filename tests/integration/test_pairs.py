"""Pairs of a teacher: killed and resumed, by two ranks, refused when they do not fit."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokar.data.pairs import HELD_OUT, PairDataset, pair_noise
from tokar.errors import UserError
from tokar.models.build import weights_hash
from tokar.models.distill.codebook import codebook_of
from tokar.models.distill.flow_map import TokenMap
from tokar.models.distill.trajectory import follow
from tokar.models.open import open_generator

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "discriminator=null", "data.image_size=16", "loop.duration=2", "loop.batch_size=8", "loop.eval_samples=8",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.", "name=tokenizer",
]  # fmt: skip
GENERATOR = [
    "train", "generator", "generator=llamagen_small", "generator.dim=32", "generator.layers=2", "generator.heads=2",
    "codes.tokenizer=tokenizer", "data.image_size=16", "loop.duration=2", "loop.batch_size=8", "loop.eval_samples=8",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.", "name=teacher",
]  # fmt: skip
PAIRS = [
    "distill", "pairs", "teacher", "count=90", "val_count=10", "shard_size=16", "batch_size=5", "solver_steps=10",
    "sampling.guidance=2", "sampling.top_k=20", "strategy.accelerator=cpu", "strategy.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(start, digits, tmp_path_factory):
    """A tokenizer, a teacher and its pairs, made in one go."""
    place = tmp_path_factory.mktemp("pairs")
    straight = [*PAIRS, "out=straight"]
    for arguments in ([*TOKENIZER, f"data.path={digits}"],
                      [*GENERATOR, f"data.path={digits}"], straight):  # fmt: skip
        command = start(place, *arguments)
        assert command.wait() == 0, command.log.read_text()
    (place / "log").write_text(command.log.read_text())
    return place


def files(place):
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_they_are_the_ends_of_trajectories(folder):
    """A pair made anew in another batch is the same, and cost and size are told."""
    said = (folder / "log").read_text()
    assert "straight/train: 90 pairs, " in said
    assert "a second on each of 1 ranks, 128 network evaluations each, " in said
    opened = open_generator(folder / "teacher", tokenizer=folder / "tokenizer")
    pairs = PairDataset(
        folder / "straight/train", opened.tokenizer.layout.to_dict(), weights_hash(opened.tokenizer),
        teacher=weights_hash(opened.generator),
        sampling={"guidance": 2.0, "temperature": 1.0, "top_k": 20, "top_p": 1.0},
    )  # fmt: skip
    assert len(pairs) == 90
    rows = np.array([3, 16, 40])
    batch = pairs.fetch(rows, rows * 0, 0)
    assert batch["label"].tolist() == [3, 6, 0]
    token_map = TokenMap(codebook_of(opened.tokenizer), steps=10)
    noise, labels = torch.from_numpy(batch["noise"]), torch.from_numpy(batch["label"])
    assert np.array_equal(follow(opened.generator, labels, noise, token_map, guidance=2.0, top_k=20), batch["codes"])
    held_out = PairDataset(folder / "straight/val")
    assert np.array_equal(held_out.fetch(rows[:1], rows[:1], 0)["noise"], pair_noise(0, [HELD_OUT + 3], held_out.layout))
    assert not np.array_equal(held_out.read(rows[:1], rows[:1] * 0), pairs.read(rows[:1], rows[:1] * 0))


def test_killed_pairs_are_resumed_to_the_same_bytes(folder, start):
    moments, out = random.Random(0), folder / "killed"
    kills = 0
    for shards in (1, 2, 4):
        command = start(folder, *PAIRS, "out=killed")
        kills += command.kill_when(lambda least=shards: len(list(out.glob("train/shard-*.json"))) >= least, moments)
    assert kills
    assert start(folder, *PAIRS, "out=killed").wait() == 0
    assert files(out) == files(folder / "straight")


@pytest.mark.slow
def test_two_ranks_write_what_one_does(folder):
    command = [str(Path(sys.executable).with_name("tokar")), *PAIRS, "out=ranks", "strategy=ddp", "strategy.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on each of 2 ranks" in done.stdout
    assert files(folder / "ranks") == files(folder / "straight")


def test_what_does_not_fit_is_refused(folder, start, monkeypatch):
    """Another guidance into the same folder in one line; another teacher, guidance or noise when they are read."""
    command = start(folder, *PAIRS, "out=straight", "sampling.guidance=3")
    assert command.wait() == 2
    line = command.log.read_text().strip()
    assert line.count("\n") == 0
    assert "made otherwise (protocol.pairs.sampling.guidance: 2.0 there, 3.0 here)" in line
    with pytest.raises(UserError, match="pairs are of another teacher"):
        PairDataset(folder / "straight/train", teacher="0" * 64)
    with pytest.raises(UserError, match=r"drawn otherwise \(guidance: 2.0 there, 1.5 here\)"):
        PairDataset(folder / "straight/train", sampling={"guidance": 1.5, "temperature": 1.0, "top_k": 20, "top_p": 1.0})
    monkeypatch.setattr("tokar.data.pairs.gaussian", lambda seed, ids, shape: np.zeros((len(ids), *shape), np.float32))
    with pytest.raises(UserError, match="comes out otherwise on this machine"):
        PairDataset(folder / "straight/train")
