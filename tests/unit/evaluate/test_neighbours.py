import numpy as np
import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate import neighbours
from tokar.evaluate.feature_net import Features
from tokar.evaluate.neighbours import KeptFeatures, KernelDistance, PrecisionRecall


def rows(count, seed, width=5, scale=1.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


def filled(measure, features, batch_size=4, order=None):
    for numbers in (torch.arange(len(features)) if order is None else order).split(batch_size):
        measure.update(Features(features[numbers]), {"index": numbers})
    return measure


def test_precision_and_recall_agree_with_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    samples, real = rows(31, 0, scale=1.3), rows(26, 1)

    def inside(points, centres):
        count = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted((centre - other).norm().item() for j, other in enumerate(centres) if j != i)
                if (point - centre).norm().item() <= others[2]:
                    count += 1
                    break
        return count / len(points)

    found = filled(PrecisionRecall(3, 31, 100, 0), samples).compute(filled(PrecisionRecall(3, 26, 100, 0), real))
    assert found == {"precision": inside(samples, real), "recall": inside(real, samples)}
    assert 0.2 < found["precision"] < 1
    with pytest.raises(UserError, match="3 images have no 3 neighbours"):
        filled(PrecisionRecall(3, 3, 9, 0), samples[:3]).compute(filled(PrecisionRecall(3, 3, 9, 0), real[:3]))


def test_an_image_that_is_there_twice_is_its_own_neighbour_once():
    twice = torch.cat([rows(8, 0), rows(8, 0)])
    assert neighbours.radii(twice.double(), 1).max() < 1e-12
    assert neighbours.radii(twice.double(), 2).min() > 0.01


def test_kernel_distance_agrees_with_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    samples, real = rows(40, 0, scale=1.2), rows(40, 1)
    theirs = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=2, subset_size=40)
    theirs.update(real, real=True)
    theirs.update(samples, real=False)
    ours = filled(KernelDistance(2, 40, 40, 50, 0), samples).compute(filled(KernelDistance(2, 40, 40, 50, 0), real))
    assert ours["kid"] == pytest.approx(theirs.compute()[0].item(), rel=1e-4)  # it counts in float32
    assert ours["kid_std"] == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_over_its_subsets():
    """Subsets of one distribution average to nothing; of two, to the distance of all."""
    one, other, far = rows(200, 0), rows(200, 1), rows(200, 2, scale=1.5)
    near = filled(KernelDistance(100, 50, 200, 200, 0), one).compute(filled(KernelDistance(100, 50, 200, 200, 0), other))
    apart = filled(KernelDistance(100, 50, 200, 200, 0), far).compute(filled(KernelDistance(100, 50, 200, 200, 0), other))
    assert abs(near["kid"]) < 0.2 * apart["kid"]
    assert apart["kid"] == pytest.approx(neighbours.squared_mmd(far.double(), other.double()), rel=0.1)
    with pytest.raises(UserError, match="subsets of 50 of 9 images"):
        filled(KernelDistance(1, 50, 9, 9, 0), one[:9]).compute(filled(KernelDistance(1, 50, 200, 200, 0), other))


def test_what_is_kept_is_bounded_and_the_same_in_any_order():
    features = rows(60, 0)
    whole, turned, part = (KeptFeatures.__subclasses__()[0](3, 60, 20, 7) for _ in range(3))
    filled(whole, features)
    filled(turned, features, 7, torch.arange(59, 29, -1))
    filled(part, features, 9, torch.arange(30))
    turned.merge(part.state_dict())
    assert whole.features.shape == (20, 5)
    assert torch.equal(whole.features, turned.features)
    assert torch.equal(whole.features, features[np.flatnonzero(whole.wanted)].double())
    assert "permutation(seed 7) of 60" in whole.protocol()["choice"]
