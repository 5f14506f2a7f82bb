"""Next-scale through the one generator stage: on the fly and from shards, pictures while training, exact resume, sampling."""

import json
import re

import numpy as np
import pytest
from tokar.evaluate.report.page import write_report

TOKENIZERS = {
    "multiscale": [
        "train", "tokenizer", "tokenizer=multiscale_small", "tokenizer.quantizer.scales=[1,2,4]",
    ],
    "flexvar": ["train", "tokenizer", "tokenizer=flexvar_small", "tokenizer.scales=[1,2,3,4]", "tokenizer.drawn_scales=1"],
}  # fmt: skip
SMALL = [
    "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,1,1]", "tokenizer.encoder.z_channels=32",
    "tokenizer.quantizer.codebook_size=32", "tokenizer.quantizer.dim=8", "discriminator=null", "losses.adversarial_weight=0",
]  # fmt: skip
GENERATORS = {
    "multiscale": ["generator=var_small", "generator.drop_path=0.2"],
    "flexvar": ["generator=flexvar_small", "generator.groups=[[2,3,1]]", "generator.map_size=8"],
}
TRAIN = [
    "train", "generator", "generator.dim=32", "generator.layers=2", "generator.heads=2", "class_dropout=0.3", "optim.lr=1e-3",
    "schedule=lin0", "schedule.warmup=2", "optim.weight_decay=0.05", "optim.weight_decay_end=0.08",
    "sampling.guidance=ramp:2.5", "sampling.top_k=20",
]  # fmt: skip
TOKENS = {"multiscale": 21, "flexvar": 30}


def spine(digits, steps, name):
    return [
        f"data.path={digits}", "data.image_size=16", f"loop.duration={steps}", "loop.batch_size=8", "loop.log_every=2",
        "loop.eval_every=4", "loop.eval_samples=16", "loop.sample_every=4", "loop.save_every=4", "loop.keep=9",
        "strategy.threads=1", "strategy.accelerator=cpu", "paths.runs=.", f"name={name}",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["multiscale", "flexvar"])
def runs(request, start, digits, tmp_path_factory):
    """A tokenizer of two steps, its generator of eight, and the folder they lie in."""
    folder = tmp_path_factory.mktemp(request.param)

    def done(*arguments):
        command = start(folder, *arguments)
        assert command.wait() == 0, command.log.read_text()
        return command.log.read_text()

    done(*TOKENIZERS[request.param], *SMALL, *spine(digits, 2, "tokenizer"))
    log = done(*TRAIN, *GENERATORS[request.param], "codes.tokenizer=tokenizer", *spine(digits, 8, "straight"))
    return request.param, folder, done, log


def contents(run):
    kept = [run / "metrics.jsonl", *run.glob("samples/*.png"), *(run / "checkpoints" / "step-00000008").rglob("*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in kept if path.is_file()}


def test_it_trains_draws_and_says_its_kernel(runs):
    _, folder, _, log = runs
    assert log.count("attention: sdpa (not flash: it needs a GPU)") == 1
    metrics = [json.loads(line) for line in (folder / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in metrics if "train/loss" in line)
    assert any("val/bits_per_token" in line for line in metrics)
    assert len(list((folder / "straight" / "samples").glob("*-samples.png"))) == 2


def test_their_report_shows_the_order_the_codes_and_how_images_build_up(runs):
    _, folder, _, _ = runs
    page = write_report([folder / "straight", folder / "tokenizer"], folder / "report.html").read_text()
    headings = re.findall(r"<h2>([^<]+)</h2>", page)
    assert {"Images", "Build-up", "Order", "Codebook"} <= set(headings)
    assert "left out" not in page
    assert len(re.findall(r"\d+ · scale\d", page)) >= 6  # columns of both runs
    assert "Codes in use" in page


def test_a_resumed_run_ends_with_the_same_bytes(runs, digits):
    import shutil

    kind, folder, done, _ = runs
    arguments = [*TRAIN, *GENERATORS[kind], "codes.tokenizer=tokenizer"]
    shutil.copytree(folder / "straight", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "step-00000008")
    for picture in (folder / "again" / "samples").glob("*8.png"):
        picture.unlink()
    expected = contents(folder / "straight")
    log = done(*arguments, *spine(digits, 8, "again"))
    assert "at step 4" in log
    found = contents(folder / "again")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name] and not name.endswith(("json", "COMPLETE"))]


def test_code_shards_and_samples(runs, digits):
    kind, folder, done, _ = runs
    done("encode", "tokenizer", f"data.path={digits}", "data.image_size=16", "out=codes", "strategy.accelerator=cpu")
    done(*TRAIN, *GENERATORS[kind], "codes.path=codes", *spine(digits, 2, "from_codes"))
    given = next((folder / "straight" / "samples").glob("*.png"))
    sampling = ["sampling.guidance=ramp:2.5", "count=4", "save=[grid,codes]", "strategy.accelerator=cpu"]
    done("sample", "straight", f"given={given}", "keep=left", "out=painted", *sampling)
    codes = np.load(folder / "painted" / "codes.npy")
    assert codes.shape == (4, TOKENS[kind])
    sides = {"multiscale": (1, 2, 4), "flexvar": (1, 2, 3, 4)}[kind]
    stays = np.concatenate([np.arange(side * side) % side < max(side // 2, 1) for side in sides])
    assert (codes[:, stays] == codes[:1, stays]).all()
    assert (codes[:, ~stays] != codes[:1, ~stays]).any()
    if kind == "flexvar":
        done("sample", "straight", "scales=[1,2,4,6]", "out=more", *sampling)
        assert np.load(folder / "more" / "codes.npy").shape == (4, 57)


def test_flex_is_refused_on_a_cpu(runs, digits, start):
    kind, folder, _, _ = runs
    command = start(folder, *TRAIN, *GENERATORS[kind], "codes.tokenizer=tokenizer", "strategy.attention=flex",
                    *spine(digits, 2, "flex"))  # fmt: skip
    assert command.wait() == 2
    assert "strategy.attention: flex cannot train on a CPU; set strategy.attention=auto" in command.log.read_text()
