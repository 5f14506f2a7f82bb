import json

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


def test_a_restarted_file_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, 0)
    for step in (10, 20, 30):
        log.write(at(step), {"loss": 1 / step})
    straight = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    again = MetricsFile(path, 20)
    again.write(at(30), {"loss": 1 / 30})
    assert path.read_bytes() == straight
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sam\n3\n{"samples": 8}\n{"step": 2}\n{"step": 3}\n')
    MetricsFile(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
