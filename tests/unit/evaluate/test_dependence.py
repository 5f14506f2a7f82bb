"""What pairs of tokens share, on samples small enough to count by hand."""

import math

import pytest
import torch
from tokar.evaluate.dependence import beyond_chance, distinct, groups_of, over_pairs, pair_information

ONE_CLASS = torch.zeros(4, dtype=torch.int64)


def test_what_pairs_share_is_what_was_counted():
    """Token 1 copies token 0, a fair coin; token 2 is a coin of its own: ln 2 and nothing."""
    codes = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
    shared = pair_information(codes, ONE_CLASS, 2)
    expected = math.log(2) * torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(shared, expected, atol=1e-12)
    assert over_pairs(shared) == pytest.approx(math.log(2) / 3)


def test_uneven_counts():
    """Cells 2/4, 1/4, 1/4: H(3/4) + H(3/4) - H(1/2, 1/4, 1/4)."""
    codes = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 0]])
    alone = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    both = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert over_pairs(pair_information(codes, ONE_CLASS, 2)) == pytest.approx(2 * alone - both)


def test_what_the_class_says_is_not_shared():
    """Two classes that differ in both tokens: dependent over the classes, independent within each."""
    codes, labels = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]]), torch.tensor([0, 0, 1, 1])
    assert over_pairs(pair_information(codes, ONE_CLASS, 2)) == pytest.approx(math.log(2))
    assert over_pairs(pair_information(codes, labels, 2)) == pytest.approx(0, abs=1e-12)


def test_what_counting_few_samples_adds_is_taken_away():
    """60 samples of each class, 8 groups: independent tokens seem to share a third of a nat; a copy keeps what it shares."""
    labels, generator = torch.arange(120) % 2, torch.Generator().manual_seed(1)
    codes = torch.randint(8, (120, 12), generator=generator)
    codes[:, 1] = codes[:, 0]
    counted, found = (measure(codes, labels, 8) for measure in (pair_information, beyond_chance))
    chance = over_pairs(counted[2:, 2:])
    assert chance > 0.3
    assert abs(over_pairs(found[2:, 2:])) < 0.05
    assert float(found[0, 1]) == pytest.approx(float(counted[0, 1]) - chance, abs=0.1)
    assert torch.equal(found, beyond_chance(codes, labels, 8))


def test_groups_lie_together_and_draw_nothing():
    codebook = torch.tensor([[0.0, 0], [10, 0], [0.1, 0], [10.1, 0], [0, 10], [0.1, 10]])
    before = torch.random.get_rng_state()
    groups = groups_of(codebook, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert groups[0] == groups[2] != groups[1] == groups[3] != groups[4] == groups[5]
    assert len(groups.unique()) == 3
    assert groups_of(codebook, 9).max() < 9


def test_distinct_codes():
    assert distinct(torch.tensor([[3, 3], [5, 3]])) == 2
