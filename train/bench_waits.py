"""What a user waits for beside training and sampling: encoding, a one-step student, checkpoints, the start of a command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..conf.overrides import quoted
from ..conf.schema import Bench
from ..data.stream import to_image
from ..errors import UserError
from ..models.build import build
from ..models.distill.dd1 import generate
from ..models.distill.students import student_node
from ..models.samplers.decode import sample
from ..models.tokenizers.base import Tokenizer
from . import checkpoint
from .bench_generators import generator_node, generator_of, layout_of
from .bench_measure import measure
from .bench_strategies import training
from .bench_table import Row
from .checkpoint import Checkpoints
from .logging import METRICS_NAME
from .strategy import Workers

POLL = 0.005


def bench_encode(config: Bench, workers: Workers) -> Row:
    """Images to codes as `tokar encode` does it, and codes back to images."""
    torch.manual_seed(0)
    tokenizer: Tokenizer = build(config.tokenizer).to(workers.device).eval()
    size = (config.batch_size, *tokenizer.layout.image_size, 3)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, device=workers.device)
    tokens = tokenizer.layout.total_tokens

    @torch.inference_mode()
    def encode() -> None:
        tokenizer.encode(to_image(pixels))

    with torch.inference_mode():
        codes = tokenizer.encode(to_image(pixels)).codes

    @torch.inference_mode()
    def decode() -> None:
        tokenizer.decode(codes)

    row = measure(config, workers, encode, images=config.batch_size, tokens=tokens)
    back = measure(config, workers, decode, images=config.batch_size)
    return {**row, "decode_images_per_s": back["images_per_s"], "decode_gflop_per_image": back.get("gflop_per_image", 0.0)}


def bench_student(config: Bench, workers: Workers) -> Row:
    """A one-step student (Distilled Decoding 1) beside its teacher with the KV cache, guided as the config says."""
    device, stream = workers.device, layout_of(config).streams[0]
    teacher = generator_of(config).to(device)
    node = student_node(generator_node(config), teacher, stream.embed_dim, [0], teacher.plan.n_units)
    student = build(node).to(device).eval()
    labels = torch.arange(config.sample_batch, device=device) % config.num_classes
    tokens = teacher.plan.n_tokens
    noise = torch.randn(config.sample_batch, tokens, stream.embed_dim, device=device)
    codebook = torch.randn(stream.vocab_size, stream.embed_dim, device=device)

    @torch.inference_mode()
    def one_step() -> None:
        generate(student, codebook, labels, noise, steps=[0])

    def draw() -> None:
        sample(teacher, labels, seed=0, **config.sampling.model_dump(exclude={"cache"}))

    fast = measure(config, workers, one_step, images=config.sample_batch, tokens=tokens)
    slow = measure(config, workers, draw, images=config.sample_batch)["images_per_s"]
    return {**fast, "teacher_images_per_s": slow, "ratio": fast["images_per_s"] / slow}


def bench_checkpoint(config: Bench, workers: Workers) -> Row:
    """Saving and restoring the generator's training, beside `out`: how long training stands still, and until it counts."""
    networks, step = training(config, workers)
    step()  # there are moments to save
    folder = Path(config.out).resolve().parent / ".bench-checkpoints"
    row: Row = {}
    try:
        for number, (name, background) in enumerate((("sync", False), ("async", True)), start=1):
            checkpoints = Checkpoints(folder, workers, keep=1, background=background)
            begun = time.perf_counter()
            state = {"step": number, "samples": 0, "world": workers.world, "main": "generator"}
            row[f"{name}_stall_ms"] = 1000 * checkpoints.save(networks, {}, state)
            checkpoints.wait()
            workers.barrier()
            row[f"{name}_written_ms"] = 1000 * (time.perf_counter() - begun)
        saved = checkpoints.newest(workers.warn)
        assert saved is not None
        row["mib"] = sum(file.stat().st_size for file in saved.path.rglob("*") if file.is_file()) / 2**20
        begun = time.perf_counter()
        checkpoint.restore(saved, networks, workers)
        row["restore_ms"] = 1000 * (time.perf_counter() - begun)
        workers.barrier()
    finally:
        if workers.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return {**row, "ratio": row["sync_stall_ms"] / row["async_stall_ms"]}


def bench_start(config: Bench, workers: Workers) -> Row:
    """From the command to its first line: `--help`; to the first finished step: training a classifier on `data`."""
    if workers.rank != 0:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        data = [quoted("data.path", str(Path(config.data.path).resolve())), f"data.image_size={config.data.image_size}",
                f"data.train_split={config.data.train_split}", f"data.val_split={config.data.val_split}"]  # fmt: skip
        words = ["train", "classifier", *data, "loop.duration=1", "loop.log_every=1", "loop.eval_samples=1", "name=start",
                 quoted("paths.runs", folder), "strategy.accelerator=" + config.strategy.accelerator]  # fmt: skip
        metrics = Path(folder) / "start" / METRICS_NAME
        first = _waited(words, lambda: metrics.exists() and metrics.stat().st_size > 0)
    return {"help_ms": _waited(["--help"]), "first_step_ms": first}


def _waited(words: list[str], arrived: Callable[[], bool] = lambda: False) -> float:
    """Milliseconds from the start of `tokar WORDS` to its end, or until what is waited for is there."""
    begun, came = time.perf_counter(), 0.0
    command = [sys.executable, "-m", "tokar.cli", *words]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        while process.poll() is None:
            came = came or (time.perf_counter() if arrived() else 0.0)
            time.sleep(POLL)
        if process.returncode:
            said.seek(0)
            raise UserError(
                f"failed: {' '.join(said.read().split())[-300:]}", where=f"tokar {words[0]}", fix="see what it says"
            )
    return 1000 * ((came or time.perf_counter()) - begun)
