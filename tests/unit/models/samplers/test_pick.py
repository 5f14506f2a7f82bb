import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.models.samplers.pick import draw, pick, restrict, uniforms
from tokar.train.bench_plain import restrict_plainly

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.25])  # order of likelihood: 1, 4, 3, 0, 2
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor) -> set[int]:
    return set(logits.isfinite().nonzero()[:, -1].tolist())


@pytest.mark.parametrize(
    ("top_k", "expected"), [(0, {0, 1, 2, 3, 4}), (1, {1}), (2, {1, 4}), (5, {0, 1, 2, 3, 4}), (9, {0, 1, 2, 3, 4})]
)
def test_top_k(top_k: int, expected: set[int]) -> None:
    assert kept(restrict(LOGITS, top_k)) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.64, {1, 4}),
        (0.66, {1, 4, 3}),
        (0.96, {1, 4, 3, 0, 2}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_token_that_passes_the_threshold(top_p: float, expected: set[int]) -> None:
    assert kept(restrict(LOGITS, top_p=top_p)) == expected


def test_top_p_counts_what_top_k_left() -> None:
    """After top-k 2 the two are 0.615 and 0.385."""
    assert kept(restrict(LOGITS, 2, 0.6)) == {1}
    assert kept(restrict(LOGITS, 2, 0.62)) == {1, 4}


def test_top_k_keeps_ties() -> None:
    assert kept(restrict(torch.tensor([1.0, 2.0, 2.0, 0.0]), 1)) == {1, 2}


def test_top_p_keeps_ties() -> None:
    assert kept(restrict(torch.tensor([1.0, 2.0, 2.0, 0.0]), top_p=0.1)) == {1, 2}


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.5), (40, 0.9), (40, 1.0), (64, 0.7), (1, 0.1)])
def test_one_pass_keeps_what_two_keep(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restrict(logits, top_k, top_p), restrict_plainly(logits, top_k, top_p))


def brute_force(logits: list[float], uniform: float, top_k: int, top_p: float) -> int:
    """One token by the definition, in plain Python."""
    array = np.asarray(logits, dtype=np.float64)
    alive = np.ones(len(array), dtype=bool)
    if top_k:
        alive &= array >= np.sort(array)[::-1][min(top_k, len(array)) - 1]
    weights = np.where(alive, np.exp(array), 0)
    weights /= weights.sum()
    if top_p < 1:
        total, chosen = 0.0, []
        for token in np.argsort(-weights, kind="stable"):
            chosen.append(token)
            total += weights[token]
            if total > top_p:
                break
        weights = np.where(np.isin(np.arange(len(array)), chosen), weights, 0)
        weights /= weights.sum()
    return int((weights.cumsum() <= uniform * weights.sum()).sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    uniform=st.integers(0, 999).map(lambda part: part / 1024),
)
def test_pick_against_the_definition(seed: int, top_k: int, top_p: float, uniform: float) -> None:
    logits = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(seed)) * 2
    picked = pick(logits, torch.full((1, 2), uniform), top_k=top_k, top_p=top_p)
    assert picked.tolist() == [[brute_force(row, uniform, top_k, top_p) for row in logits[0].tolist()]]


def test_frequencies_follow_the_distribution() -> None:
    count = 40000
    numbers = uniforms(3, range(count), 1)
    drawn = draw(LOGITS.expand(count, 1, 5), numbers)
    frequency = torch.bincount(drawn.flatten(), minlength=5) / count
    # Four standard deviations of the largest cell.
    assert (frequency - PROBABILITIES).abs().max() < 4 * (0.24 / count) ** 0.5


def test_temperature_sharpens() -> None:
    count, numbers = 20000, uniforms(0, range(20000), 1)
    picked = pick(LOGITS.expand(count, 1, 5), numbers, temperature=0.5)
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert (torch.bincount(picked.flatten(), minlength=5) / count - expected).abs().max() < 0.015


def test_greedy_takes_the_largest() -> None:
    assert pick(LOGITS.expand(2, 3, 5), torch.rand(2, 3), greedy=True).tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_impossible_tokens_are_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 1, 7), -torch.inf)
    logits[..., 2:5] = torch.randn(3)
    assert draw(logits, torch.full((1, 1), uniform)).item() in (2, 3, 4)


def test_uniforms_depend_on_seed_and_id_only() -> None:
    numbers = uniforms(7, [3, 0, 5], 100)
    assert torch.equal(numbers[1:2], uniforms(7, [0], 100))
    assert torch.equal(numbers[2], uniforms(7, range(9), 100)[5])
    assert torch.equal(numbers[0, :40], uniforms(7, [3], 40)[0])
    assert not torch.equal(numbers[0], uniforms(8, [3], 100)[0])
    assert not torch.equal(uniforms(3, [5], 100), uniforms(5, [3], 100))
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
