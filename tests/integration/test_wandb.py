"""Weights & Biases, offline: an addition to metrics.jsonl whose id outlives a restart."""

import json

RUN = [
    "train", "classifier", "classifier.width=8", "data.image_size=16", "loop.duration=6", "loop.batch_size=8",
    "loop.log_every=2",
    "loop.save_every=3", "loop.eval_samples=16", "logger=wandb_offline", "strategy.accelerator=cpu", "paths.runs=.", "name=run",
]  # fmt: skip


def test_a_restart_goes_on_with_the_same_wandb_run(start, digits, tmp_path):
    first = start(tmp_path, *RUN, f"data.path={digits}")
    folder = tmp_path / "run" / "wandb"
    while not (tmp_path / "run" / "checkpoints" / "step-00000003").exists():
        assert first.process.is_alive(), first.log.read_text()
    first.kill()
    identity = (folder / "id").read_text()
    second = start(tmp_path, *RUN, f"data.path={digits}")
    assert second.wait() == 0, second.log.read_text()
    assert (folder / "id").read_text() == identity
    assert len(list(folder.glob(f"offline-run-*-{identity}"))) == 2
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
