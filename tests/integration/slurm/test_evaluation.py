"""A submitted evaluation uses the ranks of both nodes, goes on after a signal, and ends with the numbers of one process."""

import json
import re

import numpy as np
import pytest
import torch
from tokar.models.build import save_model
from tokar.models.classifier import Classifier

COUNT = 3000


@pytest.mark.slow
def test_an_evaluation_on_two_nodes_goes_on_after_a_signal_and_ends_as_on_one_process(cluster, login, tmp_path):
    torch.manual_seed(0)
    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 4, "width": 8}
    save_model(tmp_path / "judge", node, Classifier(16, 4, width=8).state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (2, COUNT, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", pixels[0, :50])
    np.savez(tmp_path / "fake.npz", pixels[1] // 2, np.arange(COUNT) % 4)
    words = ["target=fake.npz", "features.path=judge", "reference=real.npz", "strategy.accelerator=cpu"]

    said = login("slurm", "submit", "evaluate", *words, "out=ranks", "batch_size=1", "save_every=10", "strategy.threads=1",
                 "cluster=cpu", "cluster.nodes=2", "cluster.tasks_per_node=1")  # fmt: skip
    folder, job = re.search(r"^(\S+): job (\d+) is submitted", said).groups()
    log = tmp_path / folder / "slurm" / f"{job}.log"
    cluster.until(lambda: [*(tmp_path / "ranks").glob("unfinished/*/rank-00001.pt")], 300, "the second rank's first state")
    cluster.run("scancel", "-s", "USR1", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 120, "the requeue")
    kept = [torch.load(path, weights_only=True)["held"] for path in (tmp_path / "ranks").glob("unfinished/*/rank-*.pt")]
    assert len(kept) == 2
    assert all(0 < held.sum() < COUNT for held in kept)
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", log.read_text()
    assert "stopped by a signal and saved; requeued" in log.read_text()
    assert "2 ranks have met over gloo" in log.read_text()

    login("evaluate", *words[0].split("=")[1:], *words[1:], "out=alone")
    ranks, alone = (json.loads(next((tmp_path / out).glob("*.json")).read_text()) for out in ("ranks", "alone"))
    assert ranks["numbers"] == pytest.approx(alone["numbers"], rel=1e-6)
    assert ranks["protocol_id"] == alone["protocol_id"]
    assert not (tmp_path / "ranks" / "unfinished").exists()
