import itertools

import pytest
from tokar.conf.duration import Duration
from tokar.conf.spine import Optim, ScheduleConfig
from tokar.train.clock import Clock
from tokar.train.schedule import factor, weight_decay


def at(step: int, total: int = 100) -> Clock:
    return Clock(step, step * 8, total, batch_size=8, dataset_size=100)


@pytest.mark.parametrize(
    ("text", "steps"),
    [(7, 7), ("7 steps", 7), ("2k steps", 2000), ("100 samples", 13), ("2 epochs", 25), ("1e2", 100), ("0.5k samples", 63)],
)
def test_durations_become_steps_rounded_up(text, steps):
    assert Duration.parse(text).steps(batch_size=8, dataset_size=100) == steps


@pytest.mark.parametrize("text", ["soon", "3 parsecs", "", True, None, "-4"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        Duration.parse(text)


def test_due_at_multiples_only():
    assert [step for step in range(1, 30) if at(step).due("100 samples")] == [13, 26]
    assert not at(13).due(None)


def test_advancing_moves_step_and_position_together():
    clock = at(3).advanced()
    assert (clock.step, clock.samples, clock.finished) == (4, 32, False)
    assert at(100).finished


def test_schedules_start_warm_and_end_at_the_floor():
    for kind in ("constant", "cosine", "linear", "wsd"):
        config = ScheduleConfig(kind=kind, warmup=10, floor=0.1)
        values = [factor(config, at(step)) for step in range(101)]
        assert values[0] == pytest.approx(0.1)
        assert values[9] == values[10] == pytest.approx(1.0)
        assert values[100] == pytest.approx(1.0 if kind == "constant" else 0.1)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[10:]))


def test_wsd_is_flat_then_falls_like_one_minus_sqrt():
    config = ScheduleConfig(kind="wsd", decay=0.2)
    assert factor(config, at(80)) == 1.0
    assert factor(config, at(85)) == pytest.approx(1 - 0.25**0.5)


def test_drops_multiply_from_their_step_on():
    config = ScheduleConfig(kind="drops", drops=["40 steps", 70], drop=0.1, warmup=5)
    assert [factor(config, at(step)) for step in (10, 39)] == [1.0, 1.0]
    assert [factor(config, at(step)) for step in (40, 69)] == pytest.approx([0.1, 0.1])
    assert [factor(config, at(step)) for step in (70, 100)] == pytest.approx([0.01, 0.01])


def test_lin0_is_flat_for_a_twentieth_then_straight():
    config = ScheduleConfig(kind="linear", warmup=20, first=0.005, hold=0.05, floor=0.1)
    assert factor(config, at(0)) == pytest.approx(0.005 + 0.995 / 20)
    assert factor(config, at(19)) == pytest.approx(1.0)
    for step in (20, 22, 24):  # 5 % of the 80 steps that are left
        assert factor(config, at(step)) == 1.0
    for step in (30, 60, 99):
        rest = 1 - (step - 20) / 80
        assert factor(config, at(step)) == pytest.approx(0.1 + 0.9 * rest / 0.95)
    assert factor(config, at(100)) == pytest.approx(0.1)


def test_weight_decay_moves_along_half_a_cosine():
    config = Optim(lr=1.0, weight_decay=0.05, weight_decay_end=0.08)
    assert [weight_decay(config, at(step)) for step in (0, 99)] == pytest.approx([0.05, 0.08])
    assert weight_decay(config, at(50, total=101)) == pytest.approx(0.065)
    assert weight_decay(Optim(lr=1.0, weight_decay=0.05), at(70)) == 0.05
