import json

import pytest
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.train.folder import RunFolder, run_folder

RECIPE = ["experiment=digits_classifier", "name=run"]


@pytest.fixture
def claim(tmp_path):
    """Claim the run folder with some overrides, then let it go."""

    def run(*overrides, stage="classifier", recipe=RECIPE):
        composed = compose(stage, [*recipe, f"paths.runs={tmp_path}", *overrides])
        RunFolder(run_folder(composed), composed)
        return tmp_path / "run"

    return run


def save(run):
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001" / "COMPLETE").touch()


def test_another_config_is_refused_once_something_is_saved(claim):
    run = claim("optim.lr=1")
    claim("optim.lr=2")
    save(run)
    with pytest.raises(UserError, match=r"another config: optim\.lr: 2 → 3; set name=…"):
        claim("optim.lr=3")
    with pytest.raises(UserError, match="a run of the stage 'classifier'"):
        claim(stage="tokenizer", recipe=["experiment=digits_vqgan", "name=run"])
    claim("optim.lr=2", "data.workers=3")


@pytest.mark.parametrize("content", ["", "a: [1"])
def test_a_damaged_config_is_refused(claim, content):
    run = claim()
    save(run)
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="damaged or not YAML; restore it"):
        claim()


def test_a_damaged_environment_is_written_anew(claim):
    run = claim()
    claim()
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 2
    for content in ('{"starts": ["tok', "[1]"):
        (run / "environment.json").write_text(content)
        claim()
        assert len(json.loads((run / "environment.json").read_text())["starts"]) == 1
