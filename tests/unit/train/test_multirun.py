import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokar.cli import main
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.train import multirun as module
from tokar.train.folder import run_folder

RECIPE = "experiment=digits_classifier"
RECORD = """
import pathlib, sys
folder, code = sys.argv[1:]
folder = pathlib.Path(folder)
folder.mkdir(parents=True)
lines = ['{"step": 1, "val/loss": 3.0}', '{"step": 2, "val/loss": 2.0}', '{"step": 3}', '{"step": 3, "event": "skip"}']
(folder / "metrics.jsonl").write_text("\\n".join(lines))
sys.exit(int(code))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Points that only make their run folder; those with lr 0.002 end with the given exit code."""
    monkeypatch.chdir(tmp_path)

    def install(bad=0):
        def command(stage, overrides):
            code = bad if "optim.lr=0.002" in overrides else 0
            return [sys.executable, "-S", "-c", RECORD, str(run_folder(compose(stage, overrides))), str(code)]

        monkeypatch.setattr(module, "command", command)

    install()
    return install


def folders():
    return sorted(path.name for path in Path("runs").iterdir() if not path.name.startswith("."))


def test_each_point_is_the_run_it_would_be_alone(fake):
    assert main(["train", "classifier", RECIPE, "-m", "optim.lr=1e-3,3e-4", "+seed=1"]) == 0
    assert folders() == ["digits_classifier-optim.lr=0.0003-seed=1", "digits_classifier-optim.lr=0.001-seed=1"]


def test_hydras_files_stay_below_runs(fake):
    assert main(["train", "classifier", RECIPE, "paths.runs=there", "-m", "seed=1,2"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["there"]
    (folder,) = Path("there/.multirun").iterdir()
    assert (folder / "multirun.yaml").is_file()


def test_two_sweeps_of_one_second_do_not_share_a_folder(fake, monkeypatch):
    monkeypatch.setattr(module.time, "strftime", lambda form: "now")
    assert main(["train", "classifier", RECIPE, "-m", "seed=1,2"]) == 0
    assert main(["train", "classifier", RECIPE, "-m", "seed=3,4"]) == 0
    assert len(list(Path("runs/.multirun").glob("now-*"))) == 2


def test_a_failing_point_fails_the_sweep_and_the_others_run(fake, capfd):
    fake(bad=3)
    assert main(["train", "classifier", RECIPE, "-m", "optim.lr=0.002,0.001,0.003"]) == 1
    assert len(folders()) == 3
    assert "ended with exit code 3" in capfd.readouterr().err


def test_a_stopped_point_stops_the_sweep_with_its_exit_code(fake):
    fake(bad=75)
    with pytest.raises(SystemExit) as left:
        main(["train", "classifier", RECIPE, "-m", "optim.lr=0.001,0.002,0.003"])
    assert left.value.code == 75
    assert folders() == ["digits_classifier-optim.lr=0.001", "digits_classifier-optim.lr=0.002"]


def test_problems_of_every_point_are_told_before_any_starts(fake, capsys):
    assert main(["train", "classifier", RECIPE, "-m", "optim.lr=1e-3,-1", "data=digits,cifr", "sed=1,2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "tokar: sed: no such key; did you mean 'seed'?",
        "tokar: optim.lr: must be greater than 0, not -1",
        "tokar: data=cifr: no such option; did you mean 'cifar10'?",
    ]
    assert not Path("runs").exists()


def test_groups_ranges_and_quoted_values(fake):
    assert main(["train", "classifier", RECIPE, "-m", "optim=adam,adamw", "seed=range(0,2)", "data.source='a,b'"]) == 0
    assert len(folders()) == 4


def test_an_unknown_launcher_is_one_line(fake):
    with pytest.raises(UserError, match="hydra/launcher/nope"):
        module.multirun("classifier", [RECIPE, "seed=1,2", "hydra/launcher=nope"])


def test_objective_is_the_last_value_of_the_metric(fake, monkeypatch):
    from hydra.core.utils import JobReturn

    returned = []
    monkeypatch.setattr(JobReturn, "__setattr__", lambda self, name, value: (
        returned.append(value) if name == "return_value" else None, object.__setattr__(self, name, value)))  # fmt: skip
    assert module.multirun("classifier", [RECIPE, "seed=1,2"], objective="val/loss") == 0
    assert returned == [2.0, 2.0]
    with pytest.raises(UserError, match=r"no metric 'val/los'; choose one of: val/loss$"):
        module.multirun("classifier", [RECIPE, "seed=3,4"], objective="val/los")


def test_a_signal_reaches_the_point_which_ends_first(tmp_path):
    point = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(75)))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys, tokar.train.multirun as module; from tokar.cli import main\n"
        f"module.command = lambda stage, overrides: [sys.executable, '-c', {point!r}]\n"
        f"sys.exit(main(['train', 'classifier', '{RECIPE}', '-m', 'seed=1,2']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert (tmp_path / "saved").exists()
