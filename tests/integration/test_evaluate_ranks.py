"""The same images through one process and through three, in two batch sizes, and after a kill: the same numbers."""

import json
import random

import numpy as np
import pytest
import torch
from tokar.models.build import save_model
from tokar.models.classifier import Classifier

COUNT = 90
MEASURES = "frechet,inception_score,precision_recall,kid,class_accuracy"
PROTOCOL = (
    "protocol=gfid-50k", f"count={COUNT}", "protocol.features=classifier", f"protocol.measures=[{MEASURES}]",
    "protocol.split_size=40", "protocol.subset_size=20", "protocol.keep=60", "protocol.keep_reference=50",
    "features.path=judge", "reference=real.npz", "strategy.accelerator=cpu",
)  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A classifier, and real and other images as the usual evaluator wants them."""
    torch.manual_seed(0)
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 4, "width": 8}
    save_model(tmp_path / "judge", node, Classifier(16, 4, width=8).state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (2, COUNT, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", pixels[0])
    np.savez(tmp_path / "fake.npz", pixels[1] // 2, np.arange(COUNT) % 4)
    return tmp_path


def result(place, out):
    (path,) = (place / out).glob("generation-*.json")
    return json.loads(path.read_text())


def test_ranks_batches_and_interruptions_change_nothing(place, start, start_ranks):
    def arguments(out, *more):
        return "evaluate", "fake.npz", *PROTOCOL, f"out={out}", *more

    whole = start(place, *arguments("whole"))
    assert whole.wait() == 0, whole.log.read_text()
    assert "warning: protocol gfid-50k with features=classifier" in whole.log.read_text()

    ranks = start_ranks(place, 3, *arguments("ranks", "batch_size=7", "save_every=16", "strategy=ddp", "strategy.devices=3"))
    ranks.wait()

    states = place / "killed" / "unfinished"
    slow = arguments("killed", "batch_size=1", "save_every=3")
    first = start(place, *slow)
    assert first.kill_when(lambda: any(states.glob("*/rank-00000.pt")), random.Random(0), within=0.01), first.log.read_text()
    (state,) = states.glob("*/rank-00000.pt")
    held = torch.load(state, weights_only=True)["held"]
    assert 0 < held.sum() < COUNT
    second = start(place, *slow)
    assert second.wait() == 0, second.log.read_text()
    assert not states.exists()

    expected = result(place, "whole")
    assert set(expected["numbers"]) == {
        "fd_classifier", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std", "class_accuracy"
    }  # fmt: skip
    for out in ("ranks", "killed"):
        found = result(place, out)
        assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-6, abs=1e-9)
        assert found["protocol_id"] == expected["protocol_id"]
    assert expected["protocol"]["measures"]["kid"]["kept"] == 60
    assert expected["protocol"]["reference"]["measures"]["kid"]["choice"] == "first of permutation(seed 0) of 90"
