"""The probe's config; its whole way is in tests/integration/test_probes.py."""

import pytest
import yaml
from tokar.conf.compose import compose
from tokar.errors import ConfigError, UserError
from tokar.train.probe import compose_probe, named_features


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "some_vqgan"
    folder.mkdir(parents=True)
    plain = compose("tokenizer", ["experiment=digits_vqgan", "data=cifar10", "data.flip=false"]).plain
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    return folder


def test_data_is_that_of_the_tokenizer(run):
    composed = compose_probe(run, [])
    assert composed.typed.data.path == "datasets/cifar10"
    assert composed.typed.data.flip is False
    assert composed.typed.name == "some_vqgan-ar_probe"
    assert composed.typed.codes.path == "runs/some_vqgan-ar_probe/codes"
    assert composed.typed.codes.tokenizer == str(run)


def test_data_can_be_changed_as_a_whole_or_in_part(run):
    assert compose_probe(run, ["data=digits"]).typed.data.source == "digits"
    part = compose_probe(run, ["data.workers=2"]).typed.data
    assert (part.workers, part.path) == (2, "datasets/cifar10")


def test_the_name_tells_what_was_changed_and_of_which_checkpoint(run):
    assert compose_probe(run, ["seed=3"]).typed.name == "some_vqgan-ar_probe-seed=3"
    assert compose_probe(run, ["name=mine"]).typed.codes.path == "runs/mine/codes"
    checkpoint = run / "checkpoints" / "step-00000004"
    assert compose_probe(checkpoint, []).typed.name == "some_vqgan-step-00000004-ar_probe"


def test_a_model_without_a_run_needs_data(tmp_path):
    with pytest.raises(UserError, match="name a data set"):
        compose_probe(tmp_path / "exported", [])
    assert compose_probe(tmp_path / "exported", ["data=digits"]).typed.name == "exported-ar_probe-data=digits"


def test_mistakes_are_told_together(run):
    with pytest.raises(ConfigError) as caught:
        compose_probe(run, ["optim.lrr=1", "generator.layer=2"])
    assert [line.split(":")[0] for line in caught.value.lines] == ["optim.lrr", "generator.layer"]
    with pytest.raises(ConfigError, match="one device"):
        compose_probe(run, ["strategy=ddp"])


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        (None, "classifier", None),
        ("runs/judge", "classifier", "runs/judge"),
        ("runs/judge-optim.lr=1", "classifier", "runs/judge-optim.lr=1"),
        ("inception=w.pth", "inception", "w.pth"),
    ],
)
def test_features_are_named_or_a_classifier(text, name, path):
    assert named_features(text).model_dump() == {"name": name, "path": path, "sha256": None}
