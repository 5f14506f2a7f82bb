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
