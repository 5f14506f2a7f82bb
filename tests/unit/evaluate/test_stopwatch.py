"""Turns, told by a clock that the actions move themselves."""

import torch
from tokar.evaluate import stopwatch


def test_actions_take_turns_and_the_median_counts(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def action(name, seconds):
        def run():
            called.append(name)
            now[0] += seconds[sum(other == name for other in called) - 1]

        return run

    actions = {"a": action("a", [100, 1, 9, 2]), "b": action("b", [100, 5, 4, 6])}
    seen = []
    assert stopwatch.in_turns(actions, 3, torch.device("cpu"), seen.append) == {"a": 2, "b": 5}
    assert called == ["a", "b"] * 4  # the first round warms up
    assert seen == [1] * 6


def test_three_calls_at_least_unless_one_takes_thrice_the_time(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def calls(seconds):
        called.clear()

        def run():
            called.append(seconds)
            now[0] += seconds

        rate = stopwatch.per_second(run, 1.0, torch.device("cpu"))
        return rate, len(called) - 1  # the first warms up

    assert calls(0.25) == (4, 4)
    assert calls(0.75) == (1 / 0.75, 3)
    assert calls(8.0) == (1 / 8, 1)
