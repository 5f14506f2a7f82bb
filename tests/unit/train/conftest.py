"""A tiny network in training, for tests of the parts around it."""

import pytest
import torch
from tokar.conf.spine import Ema, Optim, Strategy
from tokar.train.network import Network, Trainable
from tokar.train.strategy import Workers
from torch import nn


@pytest.fixture(scope="session")
def workers():
    return Workers(Strategy(accelerator="cpu"))


@pytest.fixture
def make_network(workers):
    def make(seed: int = 0, ema: bool = True, clip: float = 1.0, name: str = "adamw") -> Network:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        optim = Optim(name=name, lr=1e-2, weight_decay=0.1, clip=clip)
        node = {"_target_": "torch.nn.Identity"}
        return workers.wrap({"net": Trainable(module, node, optim)}, Ema(decay=0.9) if ema else None)["net"]

    return make


@pytest.fixture
def train():
    def run(network: Network, steps: int, start: int = 0) -> list[float]:
        losses = []
        for step in range(start, start + steps):
            torch.manual_seed(step)
            loss = (network(torch.randn(16, 4)) - 1).square().mean()
            network.backward(loss)
            network.step(1.0)
            if network.ema is not None:
                network.ema.update(step + 1)
            losses.append(float(loss.detach()))
        return losses

    return run
