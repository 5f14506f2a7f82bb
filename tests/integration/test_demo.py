"""The demo, as a user starts it, and what must come out."""

import json

import pytest
from shell import shell


def numbers(folder):
    """Every number of every evaluation below a folder of runs, by run and name."""
    return {
        (path.parents[1].name, name): value
        for path in folder.glob("*/evaluation/*.json")
        for name, value in json.loads(path.read_text())["numbers"].items()
    }


@pytest.mark.slow
def test_the_demo_ends_with_digits(root, tmp_path):
    output = shell(f"bash {root}/scripts/demo.sh {tmp_path}/demo", root)
    found = numbers(tmp_path / "demo" / "runs")
    assert found["digits_classifier", "accuracy"] >= 0.97
    assert found["digits_llamagen", "class_accuracy"] >= 0.90
    assert found["digits_vqgan", "codebook_usage"] >= 0.80
    assert found["digits_vqgan", "psnr"] >= 22
    assert "class_accuracy" in output
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
