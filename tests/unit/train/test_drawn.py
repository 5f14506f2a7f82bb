"""What a run leaves for its report: plan.json and codes.npz."""

import json

import numpy as np
import torch
from tokar.evaluate.report.runs import read_run
from tokar.models.build import build
from tokar.models.tokenizers.layout import Stream, TokenLayout
from tokar.train.drawn import save_counts, save_plan

LAYOUT = TokenLayout("raster", (Stream("patch", 6, 8, 4, (2, 3)),), (16, 24), 8)
NODE = {"dim": 16, "heads": 2, "layers": 1, "vocab_size": 8, "num_classes": 3}


def test_a_plan_is_written_stream_by_stream(tmp_path):
    target = "tokar.models.generators.block_diffusion.BlockDiffusion"
    generator = build({"_target_": target, **NODE, "grid": [2, 3], "block": "rows", "block_size": 1})
    save_plan(generator, {"layout": LAYOUT.to_dict()}, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "format": 1,
        "n_units": 2,
        "streams": [{"name": "patch", "grid": [2, 3], "revealed_at": [0, 0, 0, 1, 1, 1]}],
    }
    scales = {"_target_": "tokar.models.generators.next_scale.NextScale", **NODE, "grids": [[1, 1], [2, 2]], "embed_dim": 4}
    streams = tuple(Stream(f"scale{k}", (k + 1) ** 2, 8, 4, (k + 1, k + 1), k) for k in range(2))
    save_plan(build(scales), {"layout": TokenLayout("multiscale", streams, (16, 16), 8).to_dict()}, tmp_path)
    (tmp_path / "config.yaml").write_text("stage: generator\n")
    plan = read_run(tmp_path).plan
    assert [(stream["grid"], stream["revealed_at"]) for stream in plan["streams"]] == [([1, 1], [0]), ([2, 2], [1, 1, 1, 1])]


def test_networks_without_an_order_leave_none(tmp_path):
    save_plan(torch.nn.Linear(1, 1), {"layout": LAYOUT.to_dict()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_counts_come_back_whole(tmp_path):
    save_counts({"codes": torch.tensor([3.0, 0.0, 2.0**24 + 2]), "codes_scale0": torch.tensor([1.0, 0.0, 0.0])}, tmp_path)
    (tmp_path / "config.yaml").write_text("stage: tokenizer\n")
    counts = read_run(tmp_path).counts
    assert {name: part.tolist() for name, part in counts.items()} == {
        "codes": [3, 0, 2**24 + 2],
        "codes_scale0": [1, 0, 0],
    }
    assert counts["codes"].dtype == np.int64
