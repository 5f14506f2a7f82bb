import pytest

pytest.importorskip("optuna")

from tokar.conf.space import split_space
from tokar.conf.sweeps import Pruning, Sweep
from tokar.sweep.folder import Plan
from tokar.sweep.study import Study, distribution

SPACE = ["optim.lr=tag(log,interval(1e-4,1e-1))", "seed=range(0,9,3)", "optim=adam,adamw", "x=int(interval(1,5))"]
DIMENSIONS = split_space(SPACE)[1]


def study(folder, direction="minimize", **pruning):
    settings = Sweep(method="tpe", count=9, pruning=Pruning(**pruning) if pruning else None)
    return Study(folder, Plan("classifier", (), tuple(SPACE), settings, direction))


def started(one, count):
    recorded = []
    for number in range(count):
        recorded.append(one.ask(DIMENSIONS, number, recorded)[0])
    return recorded


def states(one):
    return [trial.state.name for trial in one._open(0).trials]


def test_what_dimensions_are_to_optuna():
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    assert [distribution(each) for each in DIMENSIONS] == [
        FloatDistribution(1e-4, 1e-1, log=True), IntDistribution(0, 6, step=3), CategoricalDistribution(("adam", "adamw")),
        IntDistribution(1, 5),
    ]  # fmt: skip


def test_two_processes_that_ask_at_once_draw_differently_and_the_same_again(tmp_path):
    drawn = [study(tmp_path / name).ask(DIMENSIONS, number, [])[1] for name, number in (("a", 0), ("b", 1), ("c", 0))]
    assert drawn[0] == drawn[2] != drawn[1]
    for values in drawn:
        assert [text.partition("=")[0] for text in values] == ["optim.lr", "seed", "optim", "x"]
        assert values[1] in ("seed=0", "seed=3", "seed=6")


@pytest.fixture(autouse=True)
def _folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()


def test_trials_of_processes_that_died_before_they_wrote_a_point_are_given_up(tmp_path):
    one = study(tmp_path)
    kept, lost = one.ask(DIMENSIONS, 0, [])[0], one.ask(DIMENSIONS, 1, [0])[0]
    one.ask(DIMENSIONS, 1, [kept])
    assert (kept, lost) == (0, 1)
    assert states(one) == ["RUNNING", "FAIL", "RUNNING"]


def test_a_trial_ends_once(tmp_path):
    one = study(tmp_path)
    started(one, 4)
    one.tell(0, 1.5)
    one.tell(0, None)
    one.tell(1, None)
    one.tell(2, float("nan"))
    one.report(3, [(1, 2.0)])
    one.tell(3, None, pruned=True)
    assert states(one) == ["COMPLETE", "FAIL", "FAIL", "PRUNED"]
    assert one._open(0).trials[0].value == 1.5
    assert one.report(0, [(9, 9.0)]) is False


@pytest.mark.parametrize(("direction", "good", "bad"), [("minimize", 1.0, 5.0), ("maximize", 5.0, 1.0)])
def test_the_median_decides_from_the_step_on_at_which_it_may(tmp_path, direction, good, bad):
    one = study(tmp_path, direction, kind="median", trials=2, warmup=15)
    started(one, 4)
    for number in (0, 1):
        assert one.report(number, [(step, 3.0) for step in (10, 20, 30)]) is False  # too few have ended
        one.tell(number, 3.0)
    assert one.report(2, [(10, bad)]) is False  # within its warm-up
    assert one.report(2, [(20, bad)]) is True
    assert one.report(3, [(10, good), (20, good)]) is False
    assert one.report(3, [(30, bad)]) is False  # Optuna compares the best value so far


def test_values_of_an_interrupted_process_are_not_counted_twice(tmp_path):
    one = study(tmp_path, kind="median", trials=1)
    started(one, 2)
    one.report(0, [(1, 1.0), (2, 1.0)])
    one.report(0, [(1, 1.0), (2, 1.0), (3, 1.0)])
    assert one._open(0).trials[0].intermediate_values == {1: 1.0, 2: 1.0, 3: 1.0}


def test_halving_keeps_the_best_quarter(tmp_path):
    one = study(tmp_path, kind="halving", trials=0, warmup=1)
    started(one, 5)
    assert [one.report(number, [(1, float(number))]) for number in (0, 1, 2, 3, 4)].count(True) >= 2
    assert one.report(0, [(2, 0.0)]) is False


def test_without_pruning_none_is_stopped(tmp_path):
    one = study(tmp_path)
    started(one, 2)
    one.report(0, [(1, 0.0)])
    one.tell(0, 0.0)
    assert one.report(1, [(1, 1e9)]) is False
