"""Two ranks over gloo, started by the real command, against one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "discriminator=null",
    "data.image_size=16", "data.flip=true", "loop.duration=6", "loop.batch_size=10", "loop.log_every=1", "loop.eval_samples=30",
    "strategy.accelerator=cpu", "strategy.threads=1", "paths.runs=.", "name=run",
]  # fmt: skip


def run(folder: Path, *arguments: str) -> None:
    folder.mkdir()
    command = [str(Path(sys.executable).with_name("tokar")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_train_like_one_process(digits, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, *TOKENIZER, f"data.path={digits}", "loop.accumulate=2")
    # 10 samples over 2 ranks with 3 micro-batches each: shares of 2, 2 and 1
    run(two, *TOKENIZER, f"data.path={digits}", "strategy=ddp", "strategy.devices=2", "loop.accumulate=3")
    for alone, shared in zip(losses(one), losses(two), strict=True):
        assert alone.keys() == shared.keys()
        for name in alone:
            assert shared[name] == pytest.approx(alone[name], rel=2e-4, abs=1e-5), (alone["step"], name)
    weights = [load_file(folder / "run/checkpoints/step-00000006/tokenizer/model.safetensors") for folder in (one, two)]
    worst = max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0])
    # Adam turns a rounding difference in a zero gradient into a whole step; 1e-4 is the learning rate
    assert worst < 5e-4
