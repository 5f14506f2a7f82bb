import pytest
from tokar.errors import UserError
from tokar.sweep.folder import FAILED, FINISHED
from tokar.sweep.tables import best, status
from tokar.sweep.values import direction_of, judged, ranked, series, value_of


@pytest.mark.parametrize(
    ("metric", "direction"), [("val/loss", "minimize"), ("val/accuracy", "maximize"), ("val/psnr", "maximize"), ("val/x", None)]
)
def test_the_name_says_what_is_better(metric, direction):
    assert direction_of(metric) == direction


@pytest.mark.parametrize(
    ("direction", "value", "expected"),
    [("minimize", "last", 2.0), ("minimize", "best", 1.0), ("maximize", "last", 2.0), ("maximize", "best", 3.0)],
)
def test_the_value_of_a_run(make, log, direction, value, expected):
    sweep = make(direction=direction, value=value)
    log(sweep, 0, 3.0, 1.0, float("nan"), 2.0)
    run = sweep.run(sweep.point(0))
    assert value_of(run, sweep.plan) == expected
    assert series(run, "val/loss") == [(1, 3.0), (2, 1.0), (4, 2.0)]


def test_a_metric_that_is_not_there_is_named_with_the_nearest(make, log):
    sweep = make(metric="val/los")
    log(sweep, 0, 1.0)
    with pytest.raises(UserError, match="no metric 'val/los' here; did you mean 'val/loss'"):
        value_of(sweep.run(sweep.point(0)), sweep.plan)
    sweep.write(sweep.point(0), state=FINISHED)
    assert judged(sweep)[0][1] is None
    with pytest.raises(UserError, match="no metric"):
        best(sweep.path)


@pytest.mark.parametrize(("direction", "order"), [("minimize", [1, 0]), ("maximize", [0, 1])])
def test_only_finished_points_are_ranked(make, log, direction, order):
    sweep = make(3, direction=direction)
    for number, value in ((0, 2.0), (1, 1.0), (2, 0.5 if direction == "minimize" else 9.0)):
        log(sweep, number, value)
        sweep.write(sweep.point(number), state=FINISHED if number < 2 else FAILED, tries=1, tail=("the last", "words"))
    assert [point.number for point, _ in ranked(sweep)] == order
    found = dict(best(sweep.path))
    assert found["overrides"] == f"seed={order[0]}"
    assert found["command"] == f"tokar train classifier experiment=digits_classifier seed={order[0]}"
    rows, lines = status(sweep.path)
    assert [row[1] for row in rows] == ["state", "finished", "finished", "failed"]
    assert [row[4].endswith("*") for row in rows[1:3]] == [number == order[0] for number in (0, 1)]
    assert lines[0].splitlines()[1:3] == ["    the last", "    words"]


def test_best_of_nothing(make):
    with pytest.raises(UserError, match="no point has finished yet"):
        best(make().path)
