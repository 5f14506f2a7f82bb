"""Windows of the profiler: when they are, and what of their time was communication."""

from types import SimpleNamespace

import pytest
import torch
from tokar.conf.spine import Profile
from tokar.train.profiler import Windows, allocated_peak, communication, profiled

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name, start, end, device=CPU):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)


def test_communication_on_cpu_ranks_is_from_a_collectives_call_to_its_end():
    events = [
        event("step", 0, 100),
        event("aten::mm", 0, 50),
        event("aten::add", 70, 80),
        event("gloo:all_reduce", 40, 60),
        event("gloo:all_reduce", 55, 90),
    ]
    found = communication(events)
    assert found == {"communication": pytest.approx(0.5), "communication_exposed": pytest.approx((20 + 10) / 100)}


def test_on_a_gpu_only_kernels_count():
    events = [
        event("aten::mm", 0, 1000),
        event("gemm", 0, 60, CUDA),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 50, 100, CUDA),
    ]
    assert communication(events) == {"communication": pytest.approx(0.5), "communication_exposed": pytest.approx(0.4)}


def test_one_rank_does_not_communicate():
    assert communication([event("aten::mm", 0, 10)]) == {"communication": 0.0, "communication_exposed": 0.0}


def test_windows_begin_and_end_where_the_config_says(tmp_path, monkeypatch):
    seen = []
    windows = Windows(Profile(start=2, steps=3, every=5), tmp_path, 0, torch.device("cpu"))
    monkeypatch.setattr(windows, "_begin", lambda step: (seen.append(("begin", step)), _open(windows, step)))
    monkeypatch.setattr(windows, "_end", lambda: (seen.append(("end",)), setattr(windows, "_running", None)))
    for step in range(10):
        windows.boundary(step, last=step == 9)
    assert seen == [("begin", 2), ("end",), ("begin", 7), ("end",)]


def _open(windows, step):
    windows._running, windows._begun = object(), step


def test_other_ranks_and_no_steps_mean_no_window(tmp_path):
    for config, rank in ((Profile(start=0, steps=0), 0), (Profile(start=0, steps=1, ranks=2), 2)):
        windows = Windows(config, tmp_path, rank, torch.device("cpu"))
        windows.boundary(0)
        windows.boundary(1)
        assert windows.read() == {}
    assert not list(tmp_path.iterdir())


def test_the_most_that_the_allocator_held():
    def work():
        first = torch.ones(2**20)
        del first
        return torch.ones(2**19), torch.ones(2**18)

    kept, peak = allocated_peak(work)
    assert len(kept) == 2
    assert peak == pytest.approx(4 * 2**20, abs=2**12)


def test_work_is_profiled_also_where_it_measures_memory_itself(tmp_path):
    matrix, seen = torch.ones(32, 32), []
    profiled(lambda: seen.append(allocated_peak(lambda: matrix @ matrix)), tmp_path / "new" / "row.x", torch.device("cpu"))
    assert seen[0][1] == 0
    assert "aten::mm" in (tmp_path / "new" / "row.x.txt").read_text()
    assert (tmp_path / "new" / "row.x.json.gz").stat().st_size > 100
    assert allocated_peak(lambda: matrix @ matrix)[1] == 32 * 32 * 4
