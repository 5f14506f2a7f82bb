"""Times told by a clock that the work itself moves."""

import json

import pytest
import torch
from tokar.evaluate import ranks, speed, stopwatch
from tokar.evaluate.protocol import Result
from tokar.evaluate.samples import drawn
from tokar.evaluate.speed import Laps, Speed

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batches", "seconds"), [([], 0), ([(4, 8.0)], 2), ([(4, 80.0), (4, 4.0), (1, 6.0)], 2)])
def test_the_first_batch_warms_up_unless_it_is_the_only_one(batches, seconds):
    laps = Laps()
    for batch in batches:
        laps.add(*batch)
    assert laps.seconds_per_image == seconds


class Decoder(torch.nn.Module):
    """Takes 3 seconds for a batch."""

    def __init__(self, now):
        super().__init__()
        self.now, self.weight = now, torch.nn.Parameter(torch.zeros(1))

    def decode(self, codes):
        self.now[0] += 3
        return torch.zeros(len(codes), 3, 2, 2)


def test_drawing_and_decoding_are_timed_apart_and_the_slowest_rank_is_told(monkeypatch):
    now, times = [0.0], iter([50, 2, 4])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def draw(numbers, tally):
        now[0] += next(times)
        yield {"codes": torch.zeros(len(numbers), 4)}

    measured = Speed(CPU, 2)
    list(drawn(Decoder(now), draw, measured)([torch.arange(2)] * 3))
    told = measured.told()
    assert (told["seconds_per_image"], told["decoder_seconds_per_image"]) == (1.5, 1.5)
    assert (told["batch_size"], told["threads"], told["ranks"]) == (2, torch.get_num_threads(), 1)
    assert told["device"].startswith("CPU")
    monkeypatch.setattr(speed, "gathered", lambda mine: [(0.0, 0.0), mine, (9.0, 1.0)])
    assert measured.told()["seconds_per_image"] == 9
    monkeypatch.setattr(speed, "gathered", ranks.gathered)
    assert Speed(CPU, 2).told() == {}


def test_the_speed_is_kept_and_changes_no_id(tmp_path):
    fast, slow = (Result("generation", {"a": 1.0}, {"count": 9}, speed=told) for told in ({}, {"seconds_per_image": 2.0}))
    assert fast.protocol_id == slow.protocol_id
    assert "speed" not in json.loads(fast.save(tmp_path / "a.json").read_text())
    assert Result.load(slow.save(tmp_path / "b.json")).speed == {"seconds_per_image": 2.0}
