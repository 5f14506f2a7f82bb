"""`tokar estimate`: published sizes, FLOPs by the rule of thumb, what does not fit, and what is asked wrongly."""

import re

import pytest
from tokar.errors import UserError
from tokar.train.estimate import estimate

SMALL = [
    "generator=llamagen_small",
    "generator.layers=2",
    "codes.path=x",
    "loop.duration=10",
    "codes_of=llamagen_vq16",
    "data.image_size=256",
]


def rows(*overrides):
    return dict(estimate("generator", [*SMALL, *overrides]))


def number(text):
    return float(re.search(r"[\d.]+", text)[0])


def test_a_small_generator_on_one_gpu():
    found = rows("loop.batch_size=64", "device=a100 40gb", "mfu=0.5")
    parameters = int(found["trained parameters"].replace(",", ""))
    assert found["memory of a device"].endswith("of 36.0: fits")
    flops = number(found["model FLOPs a step and device"])
    embedding = 2 * 16384 * 256  # the table is looked up, not multiplied; the head is
    assert flops == pytest.approx(6 * (parameters - embedding / 2) * 257 * 64 / 1e12, rel=0.2)
    assert number(found["computing"]) == pytest.approx(1000 * flops / 156 / 0.5, rel=0.1, abs=1)
    assert found["sending"].startswith("0.00 GiB")


def test_what_does_not_fit_is_said_and_more_ranks_or_recomputation_help():
    small, ranked = "memory_gib=2", ["strategy=zero3", "strategy.devices=8"]
    batch = ["loop.batch_size=64", small]
    assert rows(*batch)["memory of a device"].endswith("does not fit")
    assert rows(*batch, *ranked)["memory of a device"].endswith(": fits")
    again = rows(*batch, "strategy.recompute=full")
    assert number(again["memory of a device"]) < number(rows(*batch)["memory of a device"])
    assert number(again["with what is computed again"]) > number(again["model FLOPs a step and device"])


def test_nodes_send_at_the_networks_speed():
    ranked = ["strategy=ddp", "strategy.devices=8"]
    assert "at 450 GB/s" in rows(*ranked)["sending"]
    assert "at 25 GB/s" in rows(*ranked, "strategy.nodes=2", "network_gbs=25")["sending"]


def test_an_unknown_gpu_and_an_unknown_tokenizer_are_told():
    with pytest.raises(UserError, match=r"device=h1000: no such GPU in the table"):
        rows("device=h1000")
    with pytest.raises(UserError, match=r"codes_of: no experiment 'vq'"):
        rows("codes_of=vq")
    with pytest.raises(UserError, match=r"codes_of: it is not known whose codes"):
        estimate("generator", [text for text in SMALL if not text.startswith("codes_of")])


def test_a_tokenizer_with_its_discriminator():
    found = dict(estimate("tokenizer", ["experiment=digits_vqgan", "device=t4"]))
    assert found["memory of a device"].endswith(": fits")
