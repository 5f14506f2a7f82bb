import math

import pytest
from tokar.conf.space import beside_the_first, compose_all, split_space
from tokar.errors import ConfigError

RECIPE = "experiment=digits_classifier"


def dimension(text):
    fixed, (found,) = split_space([text])
    assert fixed == []
    return found


@pytest.mark.parametrize(
    ("text", "corners"),
    [
        ("optim.lr=1e-3,3e-4", ["optim.lr=0.001", "optim.lr=0.0003"]),
        ("seed=range(0,6,2)", ["seed=0", "seed=2", "seed=4"]),
        ("optim=adam,adamw", ["optim=adam", "optim=adamw"]),
        ("optim=glob(adam*)", ["optim=adam", "optim=adamw"]),
        ("+loop.duration='2k steps','3k steps'", ["+loop.duration='2k steps'", "+loop.duration='3k steps'"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["optim.betas=[0.9,0.95]", "optim.betas=[0.9,0.99]"]),
        ("optim.lr=interval(1e-4,1e-2)", ["optim.lr=0.0001", "optim.lr=0.01"]),
        ("classifier.width=int(interval(4,32))", ["classifier.width=4", "classifier.width=32"]),
    ],
)
def test_what_several_values_span(text, corners):
    assert dimension(text).corners == corners


def test_one_value_is_fixed_and_what_cannot_be_read_is_left_to_who_composes():
    assert split_space([RECIPE, "data.source='a,b'", "foo", "seed=1,2"])[0] == [RECIPE, "data.source='a,b'", "foo"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim.lr=interval(1,1)", "the interval is empty"),
        ("optim.lr=tag(log,interval(0,1))", "begins above 0"),
        ("hydra/launcher=submitit_slurm", "--multirun"),
        ("optim=glob(nope*)", "no values"),
    ],
)
def test_spaces_that_hold_nothing(text, line):
    with pytest.raises(ConfigError, match=line):
        split_space([text])


def test_shares_of_an_interval_are_even_in_its_scale_and_stay_within():
    linear, log = dimension("x=interval(0,10)"), dimension("x=tag(log,interval(1e-4,1))")
    assert [linear.at(share) for share in (0.0, 0.25, 0.5)] == ["x=0.0", "x=2.5", "x=5.0"]
    assert [float(log.at(share)[2:]) for share in (0.0, 0.25, 0.5, 0.75)] == [1e-4, 1e-3, 1e-2, 1e-1]
    narrow = dimension("x=interval(0.123456,0.123457)")
    assert {narrow.at(share) for share in (0.0, 0.5, 0.999)} <= {"x=0.123456", "x=0.123457"}
    whole = dimension("x=int(interval(2,4))")
    assert [whole.at(share) for share in (0.0, 0.34, 0.99)] == ["x=2", "x=3", "x=4"]
    assert math.isclose(float(dimension("x=interval(0,1)").at(1 / 3)[2:]), 0.3333)


def test_every_corner_beside_the_first_of_the_others():
    dimensions = split_space(["a=1,2,3", "b=x,y"])[1]
    assert beside_the_first(dimensions) == [["a=1", "b=x"], ["a=2", "b=x"], ["a=3", "b=x"], ["a=1", "b=y"]]


def test_the_problems_of_all_points_are_told_once():
    seen = []
    with pytest.raises(ConfigError) as caught:
        compose_all("classifier", [[RECIPE, "seed=-1"], [RECIPE, "seed=-1", "optim.lrr=1"], [RECIPE]], seen.append)
    assert caught.value.lines == [
        "seed: must be greater than or equal to 0, not -1",
        "optim.lrr: no such key; did you mean 'lr'?",
    ]
    assert seen == [1, 1, 1]
