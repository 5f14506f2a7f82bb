import json
from dataclasses import replace

import pytest
import torch
from tokar.train.clock import Clock
from tokar.train.logging import Meters, MetricsFile


def at(step: int) -> Clock:
    return Clock(step, step * 4, 100, 4, 40)


def test_meters_weigh_micro_batches_by_their_size():
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0)}, 3)
    meters.add({"loss": torch.tensor(5.0)}, 1)
    assert meters.read(lambda total: total) == {"loss": 2.0}
    assert meters.sums == {}


def test_a_vector_becomes_usage_and_perplexity():
    meters = Meters()
    meters.add({"codes": torch.tensor([2, 0, 0, 2])}, 1)
    meters.add({"codes": torch.tensor([0, 0, 4, 0])}, 1)
    values = meters.read(lambda total: total)
    assert values["codes/usage"] == 0.75
    assert meters.reach["codes/usage"] == 1.0
    assert values["codes/perplexity"] == pytest.approx(2 ** (0.25 * 2 + 0.5 * 1 + 0.25 * 2))


def test_meters_sum_over_ranks_before_they_divide():
    meters = Meters()
    meters.add({"loss": torch.tensor(2.0)}, 1)
    assert meters.read(lambda total: total + torch.tensor([6.0, 1.0])) == {"loss": 4.0}


def test_a_bad_step_leaves_no_trace():
    meters = Meters()
    for loss, codes, bad in ((2.0, [1, 3], False), (float("nan"), [9, 9], True)):
        step = Meters()
        step.add({"loss": torch.tensor(loss), "codes": torch.tensor(codes)}, 4)
        meters.add_step(step, torch.tensor(bad))
    values = meters.read(lambda total: total)
    assert values == {"codes/perplexity": pytest.approx(1.7548, abs=1e-4), "codes/usage": 1.0, "loss": 2.0}
    meters.add_step(step, torch.tensor(True))
    assert meters.read(lambda total: total) == {}  # nothing but bad steps


def test_a_restarted_file_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, 0)
    for step in (10, 20, 30):
        log.write(at(step), {"loss": 1 / step})
    straight = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    again = MetricsFile(path, at(20).samples)
    again.write(at(30), {"loss": 1 / 30})
    assert path.read_bytes() == straight
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good, late = '{"step": 1, "samples": 4}\n', '{"step": 3, "samples": 12}\n'
    path.write_text(good + '{"step": 2, "sam\n3\n{"samples": 8}\n{"step": 2}\n' + late)
    MetricsFile(path, 8)
    assert path.read_text() == good


def test_steps_taken_before_a_way_back_stay_since_their_samples_lie_before(tmp_path):
    log = MetricsFile(tmp_path / "metrics.jsonl", 0)
    back = replace(at(10), samples=120)
    for clock, values in ((at(10), {}), (at(30), {"event": "rollback"}), (replace(at(20), samples=160), {})):
        log.write(clock, values)
    MetricsFile(log.path, back.samples)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [10, 30]
