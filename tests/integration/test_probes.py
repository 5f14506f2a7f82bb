"""Both probes by the command line, on small tokenizers of real digits, of every kind of layout."""

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


def train(start, folder, kind):
    group, keys = KINDS[kind]
    more = ["tokenizer/quantizer=residual"] if kind == "residual" else []
    overrides = [f"name={kind}", group, *more, "data=digits", "discriminator=null", *(f"tokenizer.{key}" for key in keys)]
    ran(start, folder, "train", "tokenizer", *overrides, *SHORT)
    return folder / "runs" / kind


def results(run, name):
    return [json.loads(path.read_text()) for path in run.glob(f"evaluation/{name}-*.json")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vqgan", "residual", "multiscale", "gigatok"])
def test_probes(start, place, kind):
    run = train(start, place, kind)
    ran(start, place, "evaluate", f"runs/{kind}", "probe=linear", "probe.epochs=3", "count=100", "strategy.accelerator=cpu")
    (linear,) = results(run, "linear_probe")
    assert 0 <= linear["numbers"]["accuracy"] <= 1
    assert linear["protocol"]["count"] == linear["protocol"]["train"]["images"] == 100

    small = ["generator.layers=2", "generator.dim=32", "generator.heads=2"]
    probe = ["probe", f"runs/{kind}", *SHORT, *small, "--features", "runs/judge", "--count", "12"]
    said = ran(start, place, *probe)
    (found,) = results(run, "ar_probe")
    tokens = {"vqgan": 16, "residual": 64, "multiscale": 21, "gigatok": 16}[kind]
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
