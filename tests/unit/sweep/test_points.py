import pytest
from tokar.conf.space import split_space
from tokar.conf.sweeps import Sweep
from tokar.errors import ConfigError, UserError
from tokar.sweep.folder import FAILED, Plan, Point
from tokar.sweep.points import add_points, check_points, numbers, planned, total

RECIPE = "experiment=digits_classifier"


def plan(*space, **settings):
    return Plan("classifier", (RECIPE,), space, Sweep(**{"method": "grid", **settings}), "minimize")


def points(*space, **settings):
    made = plan(*space, **settings)
    return planned(made, split_space(space)[1])


def test_a_grid_is_every_combination_in_order():
    assert points("seed=0,1", "optim=adam,adamw") == [
        ("seed=0", "optim=adam"), ("seed=0", "optim=adamw"), ("seed=1", "optim=adam"), ("seed=1", "optim=adamw"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="a grid needs a list of values"):
        points("optim.lr=interval(0,1)")


def test_draws_depend_on_seed_and_number_alone_and_differ():
    space = ("optim.lr=tag(log,interval(1e-4,1e-1))", "seed=0,1")
    few, more = (points(*space, method="random", count=count) for count in (5, 40))
    assert more[:5] == few
    assert len(set(more)) == 40
    assert points(*space, method="random", count=5, seed=1) != few
    rates = sorted(float(values[0].partition("=")[2]) for values in more)
    assert 1e-4 <= rates[0] < 3e-4
    assert 3e-2 < rates[-1] <= 1e-1
    assert sum(rate < 1e-3 for rate in rates) >= 7  # a third of an interval that is even in its logarithm


def test_more_draws_than_there_are_points():
    assert sorted(points("seed=0,1,2", method="random", count=3)) == [("seed=0",), ("seed=1",), ("seed=2",)]
    with pytest.raises(UserError, match=r"no 4 different points .* set sweep.count=3"):
        points("seed=0,1,2", method="random", count=4)


def test_optunas_points_are_not_known_before():
    assert points("optim.lr=interval(0,1)", method="tpe", count=3) == []
    assert total(plan(method="tpe", count=3), 0) == 3
    assert total(plan(), 7) == 7


@pytest.mark.parametrize("settings", [{}, {"method": "tpe", "count": 3}])
def test_every_point_or_every_value_is_checked(settings):
    space = ("optim.lr=1e-3,-1", "seed=0,x")
    made = plan(*space, **settings)
    with pytest.raises(ConfigError) as caught:
        check_points(made, split_space(space)[1], planned(made, split_space(space)[1]))
    assert sorted(caught.value.lines) == [
        "optim.lr: must be greater than 0, not -1",
        "seed: must be a whole number, not 'x'",
    ]


def test_two_points_of_one_run_are_refused():
    space = ("data.workers=0,1",)
    with pytest.raises(ConfigError, match=r"data.workers=0 and data.workers=1 are one run, runs/digits_classifier"):
        check_points(plan(*space), split_space(space)[1], points(*space))


def test_points_are_added_and_never_replaced(make):
    sweep = make(0)
    values = [("seed=0",), ("seed=1",)]
    composed = check_points(sweep.plan, split_space(["seed=0,1"])[1], values)
    add_points(sweep, values[:1], composed[:1])
    sweep.write(sweep.point(0), state=FAILED, tries=1)
    add_points(sweep, values, composed)
    assert [point.state for point in sweep.points()] == [FAILED, "waiting"]
    assert str(sweep.run(sweep.point(1))).endswith("/runs/digits_classifier-seed=1")
    with pytest.raises(UserError, match=r"point 0 was seed=0, now it would be seed=1"):
        add_points(sweep, values[1:], composed[1:])


def test_points_that_failed_wait_for_the_others():
    tried = [Point(number, (), "", tries=tries) for number, tries in ((0, 1), (1, 0), (2, 0))]
    assert list(numbers(tried)) == [1, 2, 0]
