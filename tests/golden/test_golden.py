"""The first losses of every small experiment, on a CPU and with its seed, beside those kept as text in this folder.

A file `NAME.txt` begins with the command that makes it (few steps, small batches, what begins late begins early), then holds
a row for each step. To refresh them after a change that is meant to move losses, and to see what moved:

    TOKAR_REFRESH=1 pytest tests/golden && git diff tests/golden

On one machine the numbers come out equal to the last digit. Other CPUs add in another order: see `TOLERANCES`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tokar.conf.overrides import ROOT

HERE = Path(__file__).parent
COMMANDS = {path.stem: path.read_text().splitlines()[0].removeprefix("# ") for path in sorted(HERE.glob("*.txt"))}
DATA = {
    path.stem: found[1]
    for path in sorted(ROOT.glob("experiment/*.yaml"))
    if (found := re.search(r"override /data: (digits|cifar10)\b", path.read_text()))
}
"""The small experiments, and the images that they learn."""
REFRESH = os.environ.get("TOKAR_REFRESH") == "1"
TOLERANCES = {"tokenizer": 1e-2}
"""Relative, by stage; `TOLERANCE` of the others. Between the widest and the oldest instruction set of one CPU
(ATEN_CPU_CAPABILITY=default DNNL_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2) classifiers, transformers and students
were seen to differ by 2e-7 within these steps, and a VQ-GAN by 1e-5 until its discriminator begins and 9e-4 after:
there the weight of a loss is a ratio of gradients. For comparison: batches of 16 in place of 8 moved every row of a classifier
by 16 % and more."""
TOLERANCE = 1e-4
MAIN = "import shlex, sys; from tokar.cli import main; sys.exit(any(main(shlex.split(line)[1:]) for line in sys.stdin))"
"""Commands line by line until one fails, in one process: the imports cost as much as a curve."""


def in_order(names):
    """Commands that name another's run come after it."""
    ordered = []
    while left := [name for name in names if name not in ordered]:
        ordered += [name for name in left if set(re.findall(r"=runs/(\w+)", COMMANDS[name])) <= set(ordered)]
    return ordered


def few_images(source, target):
    """The first four images of each class."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as part:
        for name in sorted(whole.namelist()):
            if re.search(r"/000[0-3]\.jpg$", name):
                part.writestr(name, whole.read(name))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, request):
    """`runs(data)` trains every experiment on `data`, once; returns the folder of the runs."""
    done = {}

    def train(data):
        if data not in done:
            done[data] = folder = tmp_path_factory.mktemp(f"golden-{data}")
            if data == "cifar10":
                shared = request.getfixturevalue("shared_data")
                for split in ("train", "test"):
                    few_images(shared / f"cifar10-{split}.zip", folder / f"cifar10-{split}.zip")
            lines = [f"tokar data prepare data={data} workers=1"]
            lines += [COMMANDS[name] for name in in_order([name for name in COMMANDS if DATA[name] == data])]
            ended = subprocess.run(
                [sys.executable, "-c", MAIN], cwd=folder, input="\n".join(lines), capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert ended.returncode == 0, ended.stdout + ended.stderr
        return done[data] / "runs"

    return train


def curve(run):
    """Rows of a run: step, training loss, norm of the gradient of the main network."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "train/loss" in line]
    norm = next(name for name in kept[0] if name.endswith("_grad_norm"))
    return [(line["step"], line["train/loss"], line[norm]) for line in kept]


def read(path):
    return [tuple(map(float, line.split())) for line in path.read_text().splitlines() if not line.startswith("#")]


def write(path, rows):
    head = [f"# {COMMANDS[path.stem]}", "# step, train/loss, norm of the gradient"]
    path.write_text("\n".join([*head, *(f"{step} {loss:.9g} {norm:.9g}" for step, loss, norm in rows)]) + "\n")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_losses_are_the_golden_ones(runs, name):
    rows = curve(runs(DATA[name]) / name)
    if REFRESH:
        write(HERE / f"{name}.txt", rows)
    kept = read(HERE / f"{name}.txt")
    assert [row[0] for row in rows] == [row[0] for row in kept]
    tolerance = TOLERANCES.get(COMMANDS[name].split()[2], TOLERANCE)
    assert rows == [pytest.approx(row, rel=tolerance) for row in kept]


def test_every_small_experiment_has_a_curve():
    assert set(COMMANDS) == set(DATA)
    for name, command in COMMANDS.items():
        words = shlex.split(command)
        assert {f"experiment={name}", f"name={name}", "strategy.accelerator=cpu", "strategy.threads=1"} <= set(words)
