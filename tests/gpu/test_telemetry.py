"""MFU, memory and communication where there is a GPU."""

import pytest
import torch
from tokar.conf.spine import Ema, Optim, Profile, Strategy
from tokar.models.generators.next_token import NextToken
from tokar.train.clock import Clock
from tokar.train.cost import modules_of, step_cost
from tokar.train.footprint import fixed_bytes, footprint, size_of
from tokar.train.network import Trainable
from tokar.train.peaks import known, measured_flops, peak_flops
from tokar.train.profiler import Windows, most_held
from tokar.train.strategy import Workers
from tokar.train.telemetry import Lead, memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)
SHAPES = {"codes": ((8, 256), torch.int64), "label": ((8,), torch.int64)}


class Steps:
    """A stage of one generator."""

    def __init__(self):
        torch.manual_seed(0)
        generator = NextToken(vocab_size=1024, num_classes=10, grid=(16, 16), dim=512, layers=9, heads=8)
        self.trainables = {"generator": Trainable(generator, {}, Optim(lr=1e-4))}
        self.frozen = []

    def step(self, batch, clock, networks):
        losses = networks["generator"](batch["codes"], batch["label"])
        networks["generator"].backward(losses["loss"])
        return losses


def run(strategy):
    """Two steps: the most that was held, and what went on then."""
    workers = Workers(strategy)

    def begin():
        stage = Steps()
        networks = workers.wrap(stage.trainables, Ema())
        batch = {name: torch.zeros(shape, dtype=dtype, device=GPU) for name, (shape, dtype) in SHAPES.items()}

        def step():
            with workers.micro_batch(networks, 1.0, last=True):
                stage.step(batch, Clock(0, 0, 10, 8, 100), networks)
            networks["generator"].step(1.0)
            networks["generator"].ema.update(1)

        step()
        step()
        return step

    return most_held(begin, GPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_as_planned_within_a_tenth(precision):
    strategy = Strategy(accelerator="cuda", precision=precision, channels_last=False)
    stage = Steps()
    cost = step_cost(stage, strategy, SHAPES)
    sizes = [size_of(item, averages=True) for item in stage.trainables.values()]
    planned = footprint(strategy, 1, sizes, fixed_bytes(modules_of(stage)), cost).total
    _, held = run(strategy)
    assert held == pytest.approx(planned, rel=0.1)


def test_mfu_is_a_share_of_the_peak():
    strategy = Strategy(accelerator="cuda", precision="bf16", channels_last=False)
    step, _ = run(strategy)
    flops = step_cost(Steps(), strategy, SHAPES).flops
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        step()
    end.record()
    end.synchronize()
    assert 0.001 < 10 * flops / (start.elapsed_time(end) / 1000) / peak_flops(GPU, "bf16") < 1


def test_a_known_gpus_measured_peak_is_below_the_published_one():
    row = known(torch.cuda.get_device_name(GPU))
    if row is None:
        pytest.skip("not in the table")
    assert 0.2 < measured_flops(GPU, torch.bfloat16) / (1e12 * row.half) <= 1.05


def test_a_window_holds_kernels_and_a_lead_is_read_late(tmp_path):
    windows, lead = Windows(Profile(start=0, steps=1), tmp_path, 0, GPU), Lead(GPU)
    windows.boundary(0)
    lead.begin()
    torch.ones(256, 256, device=GPU) @ torch.ones(256, 256, device=GPU)
    lead.forward_done()
    windows.boundary(1)
    assert windows.read() == {"communication": 0.0, "communication_exposed": 0.0}
    assert lead.read() > 0
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "step-00000000-rank-0.json.gz",
        "step-00000000-rank-0.txt",
    }
    assert memory(GPU)["memory_mib"] >= memory(GPU)["memory_now_mib"] > 0
