"""The token map: closed forms against autograd and brute force, its outcome against the distribution it stands for."""

import functools

import pytest
import torch
from scipy import stats
from tokar.models.distill import flow_map
from tokar.models.distill.flow_map import Mixture, TokenMap
from toy_teacher import normal

TIMES = (0.05, 0.3, 0.6, 0.9, 0.98)


def source(vocab=16, dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(vocab, dim, generator=generator, dtype=dtype)
    weights = torch.rand(vocab, generator=generator, dtype=dtype) + 0.05
    return codes, (weights / weights.sum()).log()


@pytest.mark.parametrize("own_codes", [False, True], ids=["shared", "gathered"])
@pytest.mark.parametrize("t", TIMES)
def test_closed_forms_are_those_of_the_density(t, own_codes):
    codes, log_p = source(dtype=torch.float64)
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    squares = (x[:, None] - t * codes).square().sum(-1)
    log_density = (log_p - squares / (2 * (1 - t) ** 2)).logsumexp(-1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    posterior = (log_p - squares / (2 * (1 - t) ** 2)).softmax(-1).detach()
    mean = posterior @ codes
    mixture = Mixture(log_p.expand(7, 16), codes.expand(7, 16, 4) if own_codes else codes)
    x = x.detach()
    assert (mixture.score(x, t) - score).abs().max() < 1e-10
    assert (mixture.mean(x, t) - mean).abs().max() < 1e-10
    noise = (x - t * mean) / (1 - t)
    assert (mixture.velocity(x, t) - (mean - noise)).abs().max() < 1e-10
    # The other convention: tau = 1 - t, dx/dtau = E[eps - x_1], score = -E[eps]/tau, mean = x - tau·dx/dtau.
    tau = 1 - t
    other = -mixture.velocity(x, t)
    assert (other - (noise - mean)).abs().max() < 1e-10
    assert (mixture.score(x, t) + noise / tau).abs().max() < 1e-10
    assert (other + (tau * mixture.score(x, t) + x) / (1 - tau)).abs().max() < 1e-9
    assert (mixture.mean(x, t) - (x - tau * other)).abs().max() < 1e-10


def test_at_the_beginning_the_mean_is_that_of_the_source():
    codes, log_p = source(dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.allclose(Mixture(log_p.expand(3, 16), codes).velocity(x, 0.0), log_p.exp() @ codes - x)


def chi_square(codes, log_p):
    counts = torch.bincount(codes, minlength=len(log_p)).double()
    expected = log_p.double().softmax(0) * len(codes)
    return stats.chisquare(counts.numpy(), expected.numpy()).pvalue


@pytest.mark.parametrize(("solver", "steps", "exact"), [("dpm", 50, True), ("heun", 50, True), ("euler", 10, False)])
def test_outcomes_are_distributed_as_the_source(solver, steps, exact):
    """60,000 draws tell 50 steps from none; ten of Euler's must be found out."""
    codes, log_p = source()
    noise = normal(1, 60_000, 4)
    found = chi_square(TokenMap(codes, solver, steps)(noise, log_p.expand(60_000, 16)), log_p)
    assert found > 0.01 if exact else found < 1e-6


@pytest.mark.parametrize("solver", ["dpm", "heun", "euler"])
def test_it_lands_on_codes(solver):
    codes, log_p = (part.double() for part in source())
    noise, token_map = normal(2, 500, 4).double(), TokenMap(codes, solver, 50)
    logits = log_p.expand(500, 16)
    landed = token_map.land(noise, logits)
    assert (landed - codes[token_map(noise, logits)]).norm(dim=1).max() < 1e-8


def test_codes_of_no_probability_are_never_taken():
    codes, log_p = source()
    few, none = log_p.clone(), log_p.clone()
    few[3:], none[:4] = -torch.inf, -torch.inf  # so few that they are gathered, and so many that they are not
    noise = normal(3, 2000, 4)
    logits = torch.stack((few, none)).repeat(1000, 1)
    for rows in (slice(0, None, 2), slice(1, None, 2), slice(None)):
        found = TokenMap(codes, steps=20)(noise[rows], logits[rows])
        assert (logits[rows].gather(1, found[:, None]) > -torch.inf).all()
    one = torch.full_like(log_p, -torch.inf)
    one[5] = 0.0
    assert (TokenMap(codes, steps=5)(noise, one.expand(2000, 16)) == 5).all()


def test_it_turns_with_the_codes():
    """Renamed codes give the same ones under their new names, rotated noise and codes the same ones."""
    codes, log_p = (part.double() for part in source())
    noise, logits = normal(4, 1000, 4).double(), log_p.expand(1000, 16)
    found = TokenMap(codes, steps=30)(noise, logits)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order[TokenMap(codes[order], steps=30)(noise, logits[:, order])], found)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal(TokenMap(codes @ turn, steps=30)(noise @ turn, logits), found)


def test_chunks_gathering_and_shapes_change_nothing():
    codes, log_p = source()
    logits = (log_p + torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    truncated = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    noise = normal(5, 6, 5, 4)
    for given in (logits, truncated):
        whole = TokenMap(codes)(noise, given)
        assert whole.shape == (6, 5)
        assert torch.equal(TokenMap(codes, chunk=48)(noise, given), whole)
        alone = torch.stack([TokenMap(codes)(noise[:, unit], given[:, unit]) for unit in range(5)], dim=1)
        assert torch.equal(alone, whole)
    assert TokenMap(codes)(noise[:0], logits[:0]).shape == (0, 5)


def test_the_fused_path_equals_the_eager_one(monkeypatch):
    """Its graph, run without a code generator, whose compilation takes half a minute; tests/gpu runs the whole."""
    flow_map._compiled_step.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    codes, log_p = source()
    logits = (log_p + torch.randn(40, 16, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    truncated = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    noise = normal(6, 40, 4)
    for given in (logits, truncated):
        fused, eager = TokenMap(codes, fused=True), TokenMap(codes)
        assert torch.equal(fused(noise, given), eager(noise, given))
        assert torch.allclose(fused.land(noise, given), eager.land(noise, given), atol=1e-5)
    flow_map._compiled_step.cache_clear()


@pytest.mark.parametrize("wrong", [{"solver": "rk4"}, {"steps": 0}])
def test_what_it_cannot_solve_with_is_refused(wrong):
    with pytest.raises(ValueError, match="choose one of dpm, heun, euler"):
        TokenMap(torch.zeros(2, 2), **wrong)
