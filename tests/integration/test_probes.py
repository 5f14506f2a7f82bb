"""Both probes and the curves over prefixes by the command line, on small tokenizers of real digits, of every kind of layout."""

import json

import pytest
from tiny_tokenizers import KINDS

SHORT = ["loop.duration=4", "loop.batch_size=8", "loop.eval_samples=8", "logger.progress=false", "strategy.accelerator=cpu"]


def ran(start, folder, *arguments, code=0):
    command = start(folder, *arguments)
    assert command.wait() == code, command.log.read_text()
    return command.log.read_text()


@pytest.fixture(scope="module")
def place(start, tmp_path_factory):
    """A folder with the digits and a small classifier."""
    folder = tmp_path_factory.mktemp("probes")
    ran(start, folder, "data", "prepare", "data=digits", "workers=1", "shard_size=1000")
    ran(start, folder, "train", "classifier", "experiment=digits_classifier", "name=judge", *SHORT)
    return folder


@pytest.fixture(scope="module")
def train(start, place):
    """Trains a tokenizer of a kind, once; returns its run folder."""

    def once(kind):
        folder = place / "runs" / kind
        return folder if folder.exists() else train_tokenizer(start, place, kind)

    return once


def train_tokenizer(start, folder, kind):
    group, keys = KINDS[kind]
    more = ["tokenizer/quantizer=residual"] if kind == "residual" else []
    overrides = [f"name={kind}", group, *more, "data=digits", "discriminator=null", *(f"tokenizer.{key}" for key in keys)]
    ran(start, folder, "train", "tokenizer", *overrides, *SHORT)
    return folder / "runs" / kind


def results(run, name):
    return [json.loads(path.read_text()) for path in run.glob(f"evaluation/{name}-*.json")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "residual", "multiscale", "gigatok", "titok"])
def test_probes(start, place, train, kind):
    run = train(kind)
    ran(start, place, "evaluate", f"runs/{kind}", "probe=linear", "probe.epochs=3", "count=100", "strategy.accelerator=cpu")
    (linear,) = results(run, "linear_probe")
    assert 0 <= linear["numbers"]["accuracy"] <= 1
    assert linear["protocol"]["count"] == linear["protocol"]["train"]["images"] == 100

    small = ["generator.layers=2", "generator.dim=32", "generator.heads=2"]
    probe = ["probe", f"runs/{kind}", *SHORT, *small, "--features", "runs/judge", "--count", "12"]
    said = ran(start, place, *probe)
    (found,) = results(run, "ar_probe")
    tokens = {"vqgan": 16, "residual": 64, "multiscale": 21, "gigatok": 16, "titok": 16}[kind]
    assert found["numbers"]["bits_per_image"] == pytest.approx(found["numbers"]["bits_per_token"] * tokens)
    assert 0 < found["numbers"]["bits_per_token"] < 6  # 4 bits and what four steps of training may err
    assert found["numbers"]["fd_classifier"] > 0
    assert found["protocol"]["recipe"]["generator"]["layers"] == 2
    assert found["protocol"]["count"] == 296
    assert found["protocol"]["samples"]["count"] == 12
    assert "bits_per_token" in said

    again = ran(start, place, *probe)
    assert "bits_per_token" in again
    assert [other["numbers"] for other in results(run, "ar_probe")] == [found["numbers"]]
    generator = found["subject"]["generator"]
    ran(start, place, "evaluate", generator, "probe=linear", "probe.epochs=2", "count=50", "strategy.accelerator=cpu")
    (middle,) = results(place / generator, "linear_probe")
    assert middle["subject"]["width"] == 32


def test_what_cannot_be_probed_is_told_in_a_line(start, place):
    said = ran(start, place, "probe", "runs/judge", code=2)
    assert "not a tokenizer" in said
    assert "--count: 0 samples" in ran(start, place, "probe", "runs/judge", "--count", "0", code=2)
    said = ran(start, place, "evaluate", "runs/judge", "probe=linear", code=2)
    assert "probe a tokenizer or a generator" in said


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokens"), [("residual", [16, 32, 48, 64]), ("multiscale", [1, 5, 21])])
def test_an_image_builds_up(start, place, train, kind, tokens):
    run = train(kind)
    command = ["evaluate", f"runs/{kind}", "count=20", "strategy.accelerator=cpu", "features.path=runs/judge"]
    ran(start, place, *command, "measure=prefixes")
    (found,) = results(run, "prefixes")
    for metric in ("psnr", "ssim", "mse", "fd_classifier"):
        assert [f"first {k}/{metric}" for k in tokens] == [key for key in found["numbers"] if key.endswith("/" + metric)]
    assert (
        len(list(run.glob("evaluation/prefixes-*_curves.png"))) == len(list(run.glob("evaluation/prefixes-*_images.png"))) == 1
    )

    ran(start, place, *command)
    (whole,) = results(run, "reconstruction")
    for metric in ("psnr", "fd_classifier"):
        assert whole["numbers"][metric] == pytest.approx(found["numbers"][f"first {tokens[-1]}/{metric}"], rel=1e-4)
    streams = (
        [f"codebook/scale{k}" for k in range(3)] if kind == "multiscale" else [f"codebook/patch_level{k}" for k in range(4)]
    )
    assert all(0 < whole["numbers"][f"{name}_usage"] <= 1 <= whole["numbers"][f"{name}_perplexity"] for name in streams)
    assert whole["protocol"]["data"]["split"] == "val"
    assert whole["protocol"]["reference"] == "the same images, uint8"
    assert whole["protocol"]["reconstruction"].startswith("uint8, ")


@pytest.mark.slow
def test_a_tokenizer_of_one_grid_has_no_prefixes(start, place, train):
    train("vqgan")
    said = ran(start, place, "evaluate", "runs/vqgan", "measure=prefixes", code=2)
    assert "cannot decode a prefix of its raster tokens" in said


@pytest.mark.slow
def test_details_of_several_tokenizers_stand_in_one_report(start, place, train):
    for kind in ("vqgan", "multiscale"):
        run = train(kind)
        ran(start, place, "evaluate", f"runs/{kind}", "measure=crops", "count=64", "strategy.accelerator=cpu")
        (found,) = results(run, "crops")
        assert found["protocol"]["count"] == 64
    ran(start, place, "report", "runs/vqgan", "runs/multiscale", "--out", "both.html")
    page = (place / "both.html").read_text()
    assert page.count('class="plain crops"') == 1
    said = ran(start, place, "evaluate", "runs/judge", "measure=crops", code=2)
    assert "measure=crops: not for a Classifier" in said
