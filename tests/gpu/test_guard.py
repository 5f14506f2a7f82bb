"""The guard on a GPU: a step never waits for the device, and verdicts arrive two steps later."""

from itertools import pairwise

import pytest
import torch
from tokar.conf.spine import Guard as GuardConfig
from tokar.conf.spine import Optim, Strategy
from tokar.train.clock import Clock
from tokar.train.guard import DELAY, Guard
from tokar.train.network import Trainable
from tokar.train.strategy import Workers
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_no_step_waits_for_the_device_and_bad_ones_change_nothing():
    workers = Workers(Strategy(accelerator="cuda"))
    module = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    network = workers.wrap({"net": Trainable(module, {}, Optim(lr=1e-2))}, None)["net"]
    guard = Guard(GuardConfig(spike=50.0, warmup=2), {"net": network}, workers)
    images = torch.randn(32, 16, device=workers.device)
    states, read = [], []
    for step in range(1, 9):
        clock = Clock(step, 32 * step, 100, 32, 1000)
        bad = images * float("nan") if step == 4 else images
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            guard.begin()
            loss = network(bad).square().mean()
            network.backward(loss)
            update = network.step(1.0, veto=guard.judge(loss.detach(), stop=False))
            guard.conclude(clock, {"net": update})
            states.append([value.clone() for value in module.state_dict().values()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        read.append([verdict.clock.step for verdict in guard.read(clock, everything=False).bad])
    assert read.index([4]) + 1 == 4 + DELAY
    assert sum(map(len, read)) == 1
    changed = [not all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(states)]
    assert changed == [True, True, False, True, True, True, True]
