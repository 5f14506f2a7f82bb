"""Sweeps of runs that take a second, and what became of their points."""

import json
import sys


def command(digits, *words):
    """`tokar sweep classifier` on tiny images for a few steps."""
    return [
        sys.executable, "-m", "tokar.cli", "sweep", "classifier", "experiment=digits_classifier", f"data.path={digits}",
        "data.image_size=16", "classifier.width=8", "schedule.warmup=2", "loop.batch_size=16", "loop.eval_samples=64",
        "strategy.threads=1", "strategy.accelerator=cpu", *words,
    ]  # fmt: skip


def records(folder):
    """The record of each point by number."""
    return {int(path.stem): json.loads(path.read_text()) for path in (folder / "points").glob("*.json")}


def states(folder):
    """How each point stands, as it was last written."""
    return [record["state"] for _, record in sorted(records(folder).items())]


def final(folder, number, metric="val/loss"):
    """The last value of a metric of a point's run."""
    run = folder / records(folder)[number]["run"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[metric] for row in rows if metric in row][-1]
