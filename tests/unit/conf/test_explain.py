import pytest
from tokar.conf.compose import flatten, unchecked
from tokar.conf.explain import explain, keys
from tokar.conf.schema import SCHEMAS
from tokar.errors import ConfigError


def by_path(stage, *overrides):
    return {key.path: key for key in keys(stage, overrides)}


def test_types_values_and_meanings():
    found = by_path("tokenizer", "optim.lr=3e-4")
    assert (found["optim.lr"].kind, found["optim.lr"].value) == ("float > 0", "0.0003")
    assert found["loop.eval_every"].kind == "duration | null"
    assert found["loop.duration"].value == "(missing)"
    assert found["schedule.kind"].options == ("constant", "cosine", "linear", "wsd", "drops")
    assert found["optim"].options == ("adam", "adamw")
    assert found["loop.accumulate"].about == "micro-batches per rank and step"


def test_components_show_their_constructors_arguments():
    found = by_path("tokenizer")
    assert found["tokenizer.quantizer"].value == "VectorQuantizer"
    assert found["tokenizer.quantizer.codebook_size"].value == "16384"


@pytest.mark.parametrize("stage", SCHEMAS)
def test_every_key_of_the_composed_config_is_explained(stage):
    plain, _ = unchecked(stage, [])
    leaves = {path for path in flatten(plain) if not path.endswith("_target_")}
    assert leaves - by_path(stage).keys() == set()


def test_lines_are_aligned_and_overrides_checked():
    lines = explain("classifier")
    assert len({line.index("int > 0") for line in lines if line.startswith(("loop.batch_size", "loop.keep "))}) == 1
    with pytest.raises(ConfigError, match="no such option"):
        explain("classifier", ["optim=sgd"])
