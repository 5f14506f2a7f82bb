"""Speeds, memory and FLOPs of a run, told without waiting for the device at every step."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from tokar.train.clock import Clock
from tokar.train.peaks import DEVICES, known, measured_flops, peak_flops
from tokar.train.telemetry import Flops, Lead, Stopwatch, Telemetry, forget_peak, memory, note

CPU = torch.device("cpu")
CLOCK = Clock(3, 12, 100, 4, 40)


def test_peak_memory_can_begin_anew():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not forget a peak")
    torch.ones(2**26)  # 256 MiB, gone at once
    before = memory(CPU)
    assert before["memory_now_mib"] < before["memory_mib"]
    forget_peak(CPU)
    assert 0 < memory(CPU)["memory_mib"] < before["memory_mib"] - 100


def test_a_stopwatch_leaves_out_what_is_not_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watched = SimpleNamespace(watch=Stopwatch())
    now[0] = 2.0
    watched.watch.step(8, 0.5)
    with Telemetry.outside(watched):
        now[0] = 10.0
    assert watched.watch.read() == {"images_per_s": 4.0, "step_ms": 2000.0, "data_wait": 0.25}


def test_a_lead_ends_with_the_first_forward_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lead = Lead(CPU)
    for start in (1.0, 2.0):
        now[0] = start
        lead.begin()
        for moment in (0.1, 0.7):
            now[0] = start + moment
            lead.forward_done()
    assert lead.read() == pytest.approx(100)
    assert lead.read() == 0


def costs(*flops):
    """A twin whose cost depends on the shapes; it says how often it was asked."""
    asked = []

    def cost(shapes, clock):
        asked.append((shapes, clock))
        return SimpleNamespace(flops=len(shapes["x"][0]) * flops[0], frozen_flops=flops[1])

    return SimpleNamespace(cost=cost, asked=asked)


def test_each_kind_of_step_is_counted_once():
    twin = costs(100, 7)
    flops = Flops(twin)
    for names in (("loss",), ("loss",), ("loss", "r1")):
        flops.micro_batch({"x": torch.zeros(2, 3)}, dict.fromkeys(names), CLOCK)
    assert flops.read() == (600, 21)
    flops.micro_batch({"x": torch.zeros(2, 3)}, {"loss": None}, CLOCK.advanced())
    assert flops.read() == (200, 7)
    assert [clock for _, clock in twin.asked] == [CLOCK, CLOCK]


def test_a_stage_that_looks_at_values_is_not_counted():
    def refuse(shapes, clock):
        raise torch._subclasses.fake_tensor.DataDependentOutputException("item")

    flops = Flops(SimpleNamespace(cost=refuse))
    flops.micro_batch({"x": torch.zeros(2)}, {"loss": None}, CLOCK)
    assert flops.read() == (0, 0)
    assert flops.twin is None


def of_ranks(table):
    """Telemetry of one of two ranks, when the other says `table`."""
    lead = SimpleNamespace(read=lambda: 10.0)
    workers = SimpleNamespace(world=2, rank=0, device=CPU, sum=lambda mine: mine + torch.tensor(table).double())
    return SimpleNamespace(lead=lead, workers=workers)


def test_ranks_are_compared():
    values = {"data_wait": 0.1, "memory_mib": 100.0}
    found = Telemetry._ranks(of_ranks([[0, 25.0], [0, 0.3], [0, 90.0]]), values)
    assert found == {"data_wait": pytest.approx(0.3), "memory_max_mib": 100.0, "imbalance": 2.5}


def test_a_gpu_is_known_by_what_its_driver_says():
    assert known("NVIDIA A100-SXM4-40GB") == DEVICES["a100 40gb"]
    assert known("NVIDIA A100-SXM4-80GB") == DEVICES["a100"]
    assert known("NVIDIA H100 PCIe") == DEVICES["h100 pcie"]
    assert known("NVIDIA H100 80GB HBM3") == DEVICES["h100"]
    assert known("Tesla T4") == DEVICES["t4"]
    assert known("GeForce 256") is None
    assert all(row.half >= row.single > 1 and row.source for row in DEVICES.values())


def test_a_cpus_peak_is_measured():
    state = torch.random.get_rng_state()
    assert 1e8 < measured_flops(CPU, torch.float32) < 1e14
    assert peak_flops(CPU, "fp32") > 1e8
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_progress_line_shows_speed_and_mfu():
    assert note({"images_per_s": 12.34}) == "12 images/s"
    assert note({"images_per_s": 12.34, "mfu": 0.416}) == "12 images/s  MFU 42 %"
