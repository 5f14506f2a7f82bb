"""Strategies and precisions on GPUs: the tokenizer with its discriminator ends near where one CPU process ends in fp32."""

import json
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 6
TOKENIZER = [
    "train", "tokenizer", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=32",
    "discriminator.width=8", "discriminator.layers=2", "losses.adversarial_start=1", "losses.adaptive=true", "optim.clip=0.1",
    "data.image_size=16", f"loop.duration={STEPS}", "loop.batch_size=16", "loop.log_every=1", "loop.eval_samples=16",
    "paths.runs=.", "name=run",
]  # fmt: skip
TOLERANCE = {"fp32": 1e-2, "bf16": 1e-1, "fp16": 1e-1}
"""Of the loss, relative. Other kernels sum in another order, TF32 is off, and half precision rounds to 8 or 11 bits."""


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    """`loss(*overrides)` → the losses of a run's steps."""
    from tokar.data.prepare import prepare

    digits = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", digits, size=16)

    def train(*overrides):
        folder = tmp_path_factory.mktemp("run")
        command = [sys.executable, "-m", "tokar.cli", *TOKENIZER, f"data.path={digits}", *overrides]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    return train


@pytest.fixture(scope="module")
def expected(loss):
    return loss("strategy=single", "strategy.accelerator=cpu")


@pytest.mark.parametrize(
    "overrides",
    [
        "strategy=single strategy.precision=fp32",
        "strategy=single strategy.precision=bf16",
        "strategy=single strategy.precision=fp16",
        "strategy=single strategy.precision=bf16 strategy.compile=true strategy.recompute=selective",
        "strategy=ddp strategy.precision=bf16",
        "strategy=fsdp strategy.precision=bf16",
        "strategy=zero1 strategy.precision=fp16",
        "strategy=zero2 strategy.precision=bf16 strategy.offload=optimizer",
        "strategy=zero3 strategy.precision=bf16 strategy.offload=optimizer",
        "strategy=zero3 strategy.precision=fp32",
    ],
)
def test_a_run_ends_near_the_one_on_a_cpu(loss, expected, overrides):
    ranks = 1 if "single" in overrides else min(2, torch.cuda.device_count())
    found = loss(*overrides.split(), "strategy.accelerator=cuda", f"strategy.devices={ranks}")
    precision = overrides.split("precision=")[1].split()[0]
    assert found == pytest.approx(expected, rel=TOLERANCE[precision])
