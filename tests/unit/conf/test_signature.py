import inspect

import pytest
from tokar.conf import signature
from tokar.conf.signature import NoTargetError, check_components, parameters

SOURCE = '''
class Made:
    """Something.

    Args:
        width: of the hidden layers,
            in channels.
        inner: another component.

    Raises:
        ValueError: never.
    """

    def __init__(self, width: PositiveInt, inner: nn.Module, rate: Fraction = 0.5, *, kind: Literal["a", "b"] = "a", tag: str):
        pass


class Bare:
    pass


def build(size: int = 3): ...
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "made.py").write_text(SOURCE)
    monkeypatch.setattr(signature, "ROOT", tmp_path)
    signature._parameters.cache_clear()
    yield "tokar.models.made.Made"
    signature._parameters.cache_clear()


def test_reads_arguments_types_defaults_and_what_they_mean(made):
    found = parameters(made)
    assert list(found) == ["width", "inner", "rate", "kind", "tag"]
    assert [name for name, item in found.items() if item.required] == ["width", "inner", "tag"]
    assert found["inner"].adapter is None
    assert (found["rate"].annotation, found["rate"].default) == ("Fraction", "0.5")
    assert found["width"].about == "of the hidden layers, in channels."
    assert found["rate"].about == ""


def test_classes_without_a_constructor_and_functions(made):
    assert parameters("tokar.models.made.Bare") == {}
    assert list(parameters("tokar.models.made.build")) == ["size"]


def test_a_package_offers_the_names_that_it_imports(made, tmp_path):
    (tmp_path / "models" / "__init__.py").write_text("from .made import Bare, Made\nfrom torch import nn\n")
    assert list(parameters("tokar.models.Made")) == list(parameters(made))
    with pytest.raises(NoTargetError, match=r"no 'Mad' in tokar\.models; did you mean 'Made'\?"):
        parameters("tokar.models.Mad")


def test_targets_outside_tokar_are_left_to_the_builder():
    assert parameters("torch.nn.Linear") is None
    assert list(check_components({"x": {"_target_": "torch.nn.Linear", "anything": 1}})) == []


def test_unknown_names(made):
    with pytest.raises(NoTargetError, match="did you mean 'Made'"):
        parameters("tokar.models.made.Mode")
    with pytest.raises(NoTargetError, match=r"did you mean 'tokar\.models\.made'"):
        parameters("tokar.models.mde.Made")


def test_every_problem_of_nested_nodes(made):
    bare = {"_target_": "tokar.models.made.Bare"}
    nested = {"_target_": made, "width": 0, "inner": bare, "rate": 2, "kind": "c", "tag": "x", "more": 1}
    lines = list(check_components({"list": [{"_target_": made, "width": 4, "inner": nested}]}))
    assert lines == [
        "list[0].tag: missing; Made needs it",
        "list[0].inner.width: must be greater than 0, not 0",
        "list[0].inner.rate: must be less than or equal to 1, not 2",
        "list[0].inner.kind: must be 'a' or 'b', not 'c'",
        "list[0].inner.more: no such key; did you mean 'rate'?",
    ]


def test_arguments_that_the_stage_fills_in_are_not_missing(made):
    node = {"_target_": made, "width": 4, "inner": {"_target_": "tokar.models.made.Bare"}}
    assert list(check_components({"x": node}, frozenset({"tag"}))) == []


def test_read_signatures_are_the_real_ones():
    from tokar.models.classifier import Classifier

    real = inspect.signature(Classifier.__init__).parameters
    assert list(parameters("tokar.models.classifier.Classifier")) == [name for name in real if name != "self"]
