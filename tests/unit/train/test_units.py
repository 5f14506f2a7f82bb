import pytest
import torch
from tokar.models.classifier import Classifier
from tokar.models.generators.next_token import NextToken
from tokar.models.layers import Unit
from tokar.models.tokenizers.conv import ConvEncoder
from tokar.train.units import recompute, units
from torch import nn


def generator() -> NextToken:
    torch.manual_seed(0)
    return NextToken(16, 5, grid=(3, 3), dim=32, layers=3, heads=2, multiple_of=16, ffn_dropout=0.3)


def test_the_repeated_parts_of_networks_are_units():
    assert len(units(generator())) == 3
    assert len(units(ConvEncoder(width=32, multipliers=[1, 1], blocks=2, z_channels=8))) == 9
    assert units(Classifier(image_size=16, num_classes=3))
    assert units(nn.Linear(2, 2)) == []


def test_units_do_not_lie_in_one_another():
    for unit in units(generator()):
        assert not any(isinstance(inner, Unit) for inner in list(unit.modules())[1:])


@pytest.mark.parametrize("what", ["full", "selective"])
def test_recomputed_gradients_are_those_of_kept_activations(what):
    plain, thrifty = generator(), generator()
    recompute(thrifty, what)
    codes, classes = torch.randint(16, (2, 9)), torch.tensor([0, 3])
    found = []
    for network in (plain, thrifty):
        torch.manual_seed(1)  # of the dropout, which is drawn again in the backward pass
        network(codes, classes)["loss"].backward()
        found.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_full_recomputation_keeps_less():
    kept = {}
    for what in ("none", "full"):
        network = generator()
        if what == "full":
            recompute(network, "full")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            network(torch.randint(16, (2, 9)), torch.tensor([0, 3]))
        kept[what] = sum(saved)
    assert kept["full"] < 0.5 * kept["none"]
