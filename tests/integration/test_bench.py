"""`tokar bench` measures what it says, compares fast paths with their twins, and writes JSON."""

import json
import re

import pytest

SMALL = [
    "data.image_size=16", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1]", "tokenizer.encoder.blocks=1",
    "tokenizer.decoder.blocks=1", "tokenizer.quantizer.codebook_size=64", "discriminator.width=8",
    "discriminator.layers=1",
    "generator.dim=64", "generator.layers=2", "generator.heads=2", "grid=[4,4]", "seconds=0.1", "batch_size=2",
    "sample_batch=2",
    "strategy.accelerator=cpu", "out=bench.json",
]  # fmt: skip


def test_a_bench_of_everything(start, digits, tmp_path):
    command = start(tmp_path, "bench", f"data.path={digits}", *SMALL)
    assert command.wait() == 0, command.log.read_text()
    written = json.loads((tmp_path / "bench.json").read_text())
    assert set(written["rows"]) == {
        "loader", "encode", "tokenizer", "generator", "sampler", "scales", "blocks", "student", "attention", "checkpoint",
        "start", "quantizer", "update", "convolutions", "guidance", "truncation",
    }  # fmt: skip
    assert {"device", "threads", "versions", "commit", "config"} <= set(written)
    rows = written["rows"]
    assert rows["sampler"]["ratio"] == rows["sampler"]["cached_images_per_s"] / rows["sampler"]["uncached_images_per_s"]
    assert rows["scales"]["ratio"] == rows["scales"]["next_scale_images_per_s"] / rows["scales"]["next_token_images_per_s"]
    assert (rows["scales"]["next_token_steps"], rows["scales"]["next_scale_steps"]) == (16, 4)
    assert rows["generator"]["held_mib"] == pytest.approx(rows["generator"]["paper_mib"], rel=0.1)
    assert rows["blocks"]["steps2_ratio"] == rows["blocks"]["steps2_images_per_s"] / rows["blocks"]["next_token_images_per_s"]
    assert [rows["blocks"][f"steps{steps}_calls"] for steps in (1, 2, 4, 8)] == [2, 3, 5, 9]  # one block, and the class
    assert rows["student"]["ratio"] == rows["student"]["images_per_s"] / rows["student"]["teacher_images_per_s"]
    assert 0 < rows["checkpoint"]["async_stall_ms"] < rows["checkpoint"]["async_written_ms"]
    for what in ("encode", "tokenizer", "generator", "sampler", "scales", "blocks", "student"):
        row = rows[what]
        assert row["tflops"] == pytest.approx(row["gflop_per_image"] * row["images_per_s"] / 1000)
        assert {"mfu", "step_ms", "tokens_per_s"} <= set(row)
    for row in rows.values():
        assert row["memory_mib"] > 0
        assert all(value > 0 for value in row.values())
    table = command.log.read_text()
    assert "webdataset_images_per_s" in table
    assert "cached_images_per_s" in table
    assert re.search(r"^ +ms a call +images/s +tokens/s +GFLOP/image +TFLOP/s +MFU +MiB +ratio$", table, re.MULTILINE)


def test_what_cannot_be_measured_is_told(start, digits, tmp_path):
    command = start(tmp_path, "bench", "sampelr", f"data.path={digits}", *SMALL)
    assert command.wait() == 2
    assert "did you mean 'sampler'?" in command.log.read_text()


def test_another_tokenizer_is_measured_as_it_is(start, digits, tmp_path):
    sizes = [
        f"tokenizer.token_{half}.{size}" for half in ("encoder", "decoder") for size in ("width=32", "layers=1", "heads=2")
    ]
    more = ["seconds=0.1", "batch_size=2", "strategy.accelerator=cpu", "discriminator.layers=1", "out=bench.json"]
    command = start(tmp_path, "bench", "tokenizer", "--profile", "tokenizer=titok", f"data.path={digits}", *sizes, *more)
    assert command.wait() == 0, command.log.read_text()
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["config"]["tokenizer"]["quantizer"]["codebook_size"] == 8192
    assert written["rows"]["tokenizer"]["memory_mib"] > 0
    assert (tmp_path / "profile/tokenizer-rank-0.json.gz").stat().st_size > 1000
    assert "aten::" in (tmp_path / "profile/tokenizer-rank-0.txt").read_text()
