"""Sweeps whose points are written by hand or run by small functions instead of trainings."""

import json
import os

import pytest
from tokar.conf.sweeps import Sweep
from tokar.sweep.folder import Plan, Point, SweepFolder


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(n, **settings)`: a sweep of n waiting points over the seed."""
    monkeypatch.chdir(tmp_path)

    def build(points=3, /, direction="minimize", space=None, **settings):
        space = space or f"seed=range(0,{max(2, points)})"
        plan = Plan(
            "classifier", ("experiment=digits_classifier",), (space,), Sweep(**{"method": "grid", **settings}), direction
        )
        sweep = SweepFolder.create(tmp_path / "runs/sweeps/s", plan)
        for number in range(points):
            run = tmp_path / f"runs/digits_classifier-seed={number}"
            sweep.write(Point(number, (f"seed={number}",), os.path.relpath(run, sweep.path)))
        return sweep

    return build


@pytest.fixture
def log():
    """`log(sweep, number, *values)`: metrics of a point's run, one value at each step."""

    def write(sweep, number, *values, metric="val/loss"):
        run = sweep.run(sweep.point(number))
        run.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"step": step, "samples": step, metric: value}) for step, value in enumerate(values, 1)]
        (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    return write
