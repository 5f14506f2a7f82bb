"""What a worker makes of its points' ends; the processes are stand-ins that end as they are told."""

import signal

import pytest
from tokar.errors import UserError
from tokar.sweep import worker as module
from tokar.sweep.folder import FAILED, FINISHED, INTERRUPTED, PRUNED, RUNNING
from tokar.sweep.worker import Worker, exit_words


class Process:
    """Ends with a code after some looks; a signal that stops it makes it 75."""

    def __init__(self, code, looks=1):
        self.code, self.looks, self.signals = code, looks, []

    def poll(self):
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def send_signal(self, number):
        self.signals.append(number)
        self.code, self.looks = 75, 0


@pytest.fixture
def run(monkeypatch, log):
    """`run(sweep, ends)`: a worker whose points end with a code, or a code and metrics, or one of these for each start."""
    monkeypatch.setattr(module, "TICK", 0)
    monkeypatch.setattr(module, "LOOK_EVERY", 0)

    def start(sweep, ends, **settings):
        order = []

        def fork(stage, overrides, place, environment, others):
            number = int(place.stem)
            order.append(number)
            end = ends[number].pop(0) if isinstance(ends[number], list) else ends[number]
            code, *values = end if isinstance(end, tuple) else (end, 1.0 + number)
            with place.open("a") as file:
                file.write(f"start\nlast words of {number}\n")
            log(sweep, number, *values)
            return Process(code, looks=3)

        monkeypatch.setattr(module, "fork", fork)
        worker = Worker(sweep, **settings)
        return worker.run(), order

    return start


def states(sweep):
    return [point.state for point in sweep.points()]


def test_all_points_once_and_nothing_the_second_time(make, run):
    sweep = make(3)
    assert run(sweep, [0, 0, 0], slots=2) == (0, [0, 1, 2])
    assert states(sweep) == [FINISHED] * 3
    assert run(sweep, []) == (0, [])


def test_failed_points_come_after_the_others_are_told_at_once_and_given_up(make, run, capsys):
    sweep = make(3, retries=1)
    code, order = run(sweep, [[(1, 1.0), (1, 1.0)], 0, [(-9, 1.0), (0, 1.0)]])
    assert (code, order) == (1, [0, 1, 2, 0, 2])
    assert states(sweep) == [FAILED, FINISHED, FINISHED]
    assert [point.tries for point in sweep.points()] == [2, 0, 1]
    told = capsys.readouterr().err
    assert "point 0 failed (exit code 1, try 1 of 2; it is tried again): seed=0\n    start\n    last words of 0\n" in told
    assert "point 0 failed (exit code 1, try 2 of 2; try it again with sweep.retries=2)" in told
    assert "point 2 failed (killed by SIGKILL, perhaps out of memory, try 1 of 2" in told
    assert run(sweep, []) == (1, [])


def test_an_interrupted_point_is_taken_again_without_a_try(make, run):
    sweep = make(2, retries=0)
    sweep.write(sweep.point(1), state=RUNNING, starts=1)
    assert run(sweep, [0, 0]) == (0, [0, 1])
    assert [(point.starts, point.tries) for point in sweep.points()] == [(1, 0), (2, 0)]


@pytest.mark.parametrize(("code", "ended"), [(75, 75), (130, 130)])
def test_a_point_that_was_stopped_stops_the_sweep_which_goes_on_later(make, run, code, ended):
    sweep = make(3)
    assert run(sweep, [0, code, 0]) == (ended, [0, 1])
    assert states(sweep) == [FINISHED, INTERRUPTED, "waiting"]
    assert run(sweep, [0, 0, 0]) == (0, [1, 2])


def test_a_signal_is_handed_on_and_no_point_starts_after_it(make, run, monkeypatch):
    sweep = make(4)
    looks = []
    real = Worker._look

    def look(self, running):
        looks.append(running)
        if len(looks) == 1:
            signal.raise_signal(signal.SIGINT)
        real(self, running)

    monkeypatch.setattr(Worker, "_look", look)
    assert run(sweep, [0, 0, 0, 0], slots=2) == (130, [0, 1])
    assert states(sweep) == [INTERRUPTED, INTERRUPTED, "waiting", "waiting"]
    assert {tuple(each.process.signals) for each in looks} == {(signal.SIGINT,)}


def test_one_point_alone(make, run):
    sweep = make(3, retries=1)
    assert run(sweep, [0, [(1, 1.0), (0, 1.0)], 0], only=1) == (0, [1, 1])
    assert states(sweep) == ["waiting", FINISHED, "waiting"]
    assert run(sweep, [0, 0, 0], single=True) == (0, [0])


def test_a_point_that_somebody_else_runs_is_left_alone(make, run):
    sweep = make(2)
    claim = sweep.claim(0)
    sweep.write(claim.point, state=RUNNING)
    assert run(sweep, [0, 0], only=0) == (0, [])


def test_a_metric_that_is_not_there_is_a_warning_for_a_grid(make, run, capsys):
    sweep = make(2, metric="val/acuracy", direction="maximize")
    assert run(sweep, [0, 0]) == (0, [0, 1])
    assert states(sweep) == [FINISHED] * 2
    assert "warning: point 0 finished, but" in capsys.readouterr().err


@pytest.fixture
def tpe(make):
    pytest.importorskip("optuna")
    return lambda **settings: make(
        0, method="tpe", count=settings.pop("count", 3), space="seed=int(interval(0,1000))", **settings
    )


def test_optuna_is_asked_until_there_are_enough(tpe, run, log):
    sweep = tpe()
    code, order = run(sweep, [(0, 3.0), (0, 1.0), (0, 2.0)])
    assert (code, len(set(order))) == (0, 3)
    assert [trial.value for trial in Worker(sweep).study._open(0).trials] == [3.0, 1.0, 2.0]


def test_a_bad_point_is_pruned_and_not_started_again(tpe, run):
    sweep = tpe(pruning={"kind": "median", "trials": 2})
    assert run(sweep, [(0, 1.0, 1.0), (0, 1.0, 1.0), (0, 9.0, 9.0)])[0] == 0
    assert states(sweep) == [FINISHED, FINISHED, PRUNED]
    assert sweep.point(2).reason == "pruned at step 2"
    assert run(sweep, []) == (0, [])


def test_optuna_cannot_do_without_the_metric(tpe, run):
    sweep = tpe(metric="val/los")
    with pytest.raises(UserError, match="no metric 'val/los' here"):
        run(sweep, [(0, 1.0)])


def test_a_used_up_space_ends_the_sweep(make, run, capsys, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(module, "REDRAWS", 5)
    sweep = make(0, method="tpe", count=5, space="seed=0,1")
    code, order = run(sweep, [0, 0])
    assert (code, sorted(order)) == (0, [0, 1])
    assert "no new point in 5 draws; the space is used up" in capsys.readouterr().out


def test_words_of_exit_codes():
    assert [exit_words(code) for code in (2, -15)] == ["exit code 2", "killed by SIGTERM"]
