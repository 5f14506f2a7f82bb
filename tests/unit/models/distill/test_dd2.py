"""DD2's pieces: closed-form scores at any level, gradients of the distillation losses, networks that see what they may."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.errors import UserError
from tokar.models.distill import dd2
from tokar.models.distill.adapt import VectorEmbedding, continuous, fit_embedding
from tokar.models.distill.ar_diffusion import ARDiffusion
from tokar.models.distill.cca import contrastive_loss
from tokar.models.distill.codebook import codebook_of, nearest
from tokar.models.distill.distilled import Helper
from tokar.models.distill.flow_map import Mixture
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import Tally, sample
from torch import nn
from torch.nn import functional as F
from toy_teacher import TableTeacher, circle, draw_levels, normal

DRY = {"token_dropout": 0, "resid_dropout": 0, "ffn_dropout": 0}


def token_teacher():
    torch.manual_seed(0)
    return NextToken(16, 3, n_tokens=6, dim=32, layers=2, heads=2, **DRY)


def token_model():
    backbone = continuous(token_teacher(), embed_dim=4, hidden=32)
    backbone.tokens.codebook.copy_(normal(9, 16, 4))
    return ARDiffusion(backbone, 4, width=32, depth=2), normal(9, 16, 4)


def scale_model():
    tokenizer = tiny("multiscale")
    torch.manual_seed(0)
    backbone = NextScale(16, 3, [[1, 1], [2, 2], [4, 4]], 4, dim=32, layers=2, heads=2, gate_init=0.5)
    backbone.bind(tokenizer)
    return ARDiffusion(backbone, 4, width=32, depth=2), codebook_of(tokenizer)


@pytest.fixture(params=["token", "scale"])
def model(request):
    built, codebook = token_model() if request.param == "token" else scale_model()
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.1 * torch.randn_like(weight, generator=None))
    return built.eval(), codebook


@pytest.mark.parametrize("support", [None, 5])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_teachers_score_is_that_of_each_token(support, chunk):
    logits, codes = 2 * normal(0, 2, 3, 16), normal(9, 16, 4)
    if support:
        logits = logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)
    tau, noise = 0.02 + 0.96 * torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)), normal(1, 2, 2, 3, 4)
    x = dd2.noised(normal(2, 2, 3, 4), noise, tau).requires_grad_()
    score = dd2.TeacherScore(logits, codes, support, chunk)
    found = score.mean(x, tau)
    for draw, row, token in [(0, 0, 0), (1, 0, 2), (1, 1, 1)]:
        place = (draw, row, token)
        one = Mixture.of(logits[row, token][None], codes).mean(x[place][None], 1 - float(tau[place]))
        assert torch.allclose(found[place], one[0], atol=1e-5)
    velocity = score.velocity(x, tau)
    assert torch.allclose(velocity, (x - found) / tau[..., None], atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().amax(-1).min() > 0


def test_features_see_what_came_before_and_velocities_their_own_token(model):
    """Of vectors as of codes, shifted as the teacher's; tokens of a scale share what lies before the scale."""
    net, codebook = model
    plan, label = net.backbone.plan, torch.tensor([1])
    codes = torch.randint(16, (1, plan.n_tokens), generator=torch.Generator().manual_seed(0))
    vectors = F.embedding(codes, codebook)
    with torch.no_grad():
        features = net.features(vectors, label)
        assert torch.allclose(features, net.features(codes, label), atol=1e-5)
        for token in range(plan.n_tokens):
            moved = vectors.clone()
            moved[0, token] += 1
            changed = (net.features(moved, label) - features).abs().amax(-1)[0] > 1e-6
            expected = [unit > plan.revealed_at[token] for unit in plan.revealed_at]
            assert changed.tolist() == expected
        x, tau = normal(3, 2, 1, plan.n_tokens, 4), torch.full((2, 1, plan.n_tokens), 0.5)
        velocity = net(vectors, label, x, tau)
        assert torch.allclose(net.mean(features, x, tau), x - 0.5 * velocity, atol=1e-6)
        other = net.velocity(features, x, tau + 0.2)
        assert (other - velocity).abs().amax(-1).min() > 1e-6
        noise = normal(4, 1, plan.n_tokens, 4)
        one = net.generate(noise, label)
        assert torch.allclose(one, noise - net(noise, label, noise, torch.ones(1, plan.n_tokens)), atol=1e-6)


def test_drawing_with_a_cache_is_drawing_without(model):
    net, codebook = model
    plan, labels, noise = net.backbone.plan, torch.tensor([0, 1]), normal(5, 2, net.backbone.plan.n_tokens, 4)
    found = net.sample(noise, labels, codebook, steps=3)
    codes = torch.zeros_like(found)
    for unit in range(plan.n_units):
        part = plan.columns(unit)
        with torch.no_grad():
            features, x = net.features(codes, labels)[:, part], noise[:, part]
            for step in (3, 2, 1):
                x = x - net.velocity(features, x, torch.full(x.shape[:-1], step / 3)) / 3
        codes[:, part] = nearest(x, codebook)
    assert torch.equal(found, codes)


def test_levels():
    uniform = torch.linspace(0, 1, 1001)
    assert dd2.levels(uniform)[[0, 500, -1]].tolist() == pytest.approx([dd2.LEAST, 0.5, dd2.MOST], rel=1e-6)
    assert (dd2.levels(uniform, 2.0) <= dd2.LEAST + (dd2.MOST - dd2.LEAST) / 4).float().mean().item() == pytest.approx(
        0.5, abs=1e-3
    )


def test_distillation_losses():
    """SiD at α = 1 is `(f_Phi - f_psi)·(f_psi - x)/w`; DMD's gradient at x is `(f_psi - f_Phi)/w`; both rest at agreement."""
    x, real, fake = normal(0, 2, 3, 4).requires_grad_(), normal(1, 5, 2, 3, 4), normal(2, 5, 2, 3, 4)
    weight = (x - real).abs().mean(-1, keepdim=True).detach()
    sid = dd2.distillation_loss(x, real, fake)
    assert torch.allclose(sid, ((real - fake) * (fake - x) / weight).sum(-1).mean())
    half = dd2.distillation_loss(x, real, fake, alpha=0.5)
    assert torch.allclose(half, ((real - fake) * ((real - x) - 0.5 * (real - fake)) / weight).sum(-1).mean())
    (gradient,) = torch.autograd.grad(dd2.distillation_loss(x, real, fake, "dmd"), x)
    assert torch.allclose(gradient, ((fake - real) / weight).sum(0) / (5 * 2 * 3), atol=1e-6)
    for form in ("sid", "dmd"):
        (gradient,) = torch.autograd.grad(dd2.distillation_loss(x, real, real, form), x)
        assert gradient.abs().max() < 1e-6
    near = dd2.distillation_loss(real[0], real, fake)
    assert near.isfinite()


def test_at_the_optimum_the_generator_rests():
    """A fake score that is the teacher's own leaves the generator where it is, whatever it makes."""
    teacher, codes = TableTeacher(n_tokens=6), circle(4)
    logits = teacher.logits(torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3))
    score = dd2.TeacherScore(logits, codes)
    x = normal(0, 3, 6, 2).requires_grad_()
    tau, noise = draw_levels(2, x)
    at = dd2.noised(x, noise, tau)
    for form in ("sid", "dmd"):
        loss = dd2.distillation_loss(x, score.mean(at, tau), score.mean(at, tau), form)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["sid", "dmd"])
def test_the_generators_gradient_passes_a_frozen_network(model, form):
    """Nothing comes into the fake network's weights, nor into the prefix: only into the generator."""
    net, codebook = model
    net.requires_grad_(False)
    generator, _ = token_model() if isinstance(net.backbone, NextToken) else scale_model()
    plan, labels = net.backbone.plan, torch.tensor([0, 1])
    asked = []

    def logits(prefix):
        asked.append(prefix)
        return normal(7, 2, plan.n_tokens, 16)

    start, (tau, noise) = normal(6, 2, plan.n_tokens, 4), draw_levels(3, normal(6, 2, plan.n_tokens, 4))
    for snap in (False, True):
        x = generator(start, labels)
        loss = dd2.generator_loss(x, net, logits, codebook, labels, tau, noise, form=form, snap=snap)
        loss.backward()
        assert all(weight.grad is None for weight in net.parameters())
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in generator.parameters())
        assert not asked[-1].requires_grad
        on_codes = torch.equal(asked[-1], F.embedding(nearest(asked[-1], codebook), codebook))
        assert on_codes == snap


def test_network_losses_are_means_of_squared_velocities(model):
    net, codebook = model
    plan, labels = net.backbone.plan, torch.tensor([0, 1])
    codes = torch.randint(16, (2, plan.n_tokens))
    vectors, (tau, noise) = F.embedding(codes, codebook), draw_levels(2, normal(0, 2, plan.n_tokens, 4))
    x = dd2.noised(vectors, noise, tau)
    velocity = net(vectors, labels, x, tau)
    assert torch.allclose(
        dd2.fake_score_loss(net, vectors, vectors, labels, tau, noise), (velocity - (noise - vectors)).square().mean()
    )
    sure = dd2.TeacherScore(50.0 * F.one_hot(codes, 16), codebook)  # whose target is then the very noise that was added
    exact = dd2.ground_truth_score_loss(net, codes, labels, sure, codebook, tau, noise)
    assert torch.allclose(exact, (velocity - (noise - vectors)).square().mean(), rtol=1e-3)
    assert float(tau.min()) >= 0.02
    assert float(tau.max()) <= 0.98


def test_the_last_units_are_drawn_anew():
    teacher, codes = token_teacher().eval(), normal(9, 16, 4)
    nn.init.normal_(teacher.head.weight)
    labels, vectors = torch.tensor([0, 1]), normal(1, 2, 6, 4)
    known, tally = nearest(vectors, codes), Tally()
    found = dd2.refine(Helper(teacher, 3, {"guidance": 2.0}), vectors, labels, codes, 2, tally=tally)
    assert (tally.calls, tally.evaluations) == (2, 4)
    assert torch.equal(found[:, :4], known[:, :4])
    given = known.clone()
    given[:, 4:] = -1
    assert torch.equal(found, sample(teacher, labels, seed=3, given=given, guidance=2.0, cache=False))
    with pytest.raises(UserError, match="7 of 6 units"):
        dd2.refine(Helper(teacher, 3, {}), vectors, labels, codes, 7)


def test_a_fitted_embedding_gives_the_teacher_back():
    teacher = token_teacher().eval()
    nn.init.normal_(teacher.head.weight)
    labels, given = torch.tensor([0, 1]), torch.randint(16, (2, 6))
    expected, table = teacher.logits(given, labels).detach(), teacher.tokens.weight.detach().clone()
    adapted = continuous(teacher, embed_dim=4, hidden=64)
    embedding = adapted.tokens
    assert isinstance(embedding, VectorEmbedding)
    before = float(fit_embedding(embedding, table, normal(9, 16, 4), steps=1))
    assert float(fit_embedding(embedding, table, normal(9, 16, 4), steps=600)) < 0.01 * before
    assert (adapted.logits(given, labels) - expected).norm() < 0.1 * expected.norm()
    codes = sample(adapted, labels, seed=0)
    assert torch.equal(codes, sample(adapted, labels, seed=0, cache=False))
    with pytest.raises(ValueError, match="no table of tokens"):
        continuous(adapted, embed_dim=4)
    with pytest.raises(ValueError, match="reads codes alone"):
        ARDiffusion(token_teacher(), 4)


def test_contrastive_alignment():
    """The formula on both sides, the dropped samples positive twice, and a step towards it that widens the margin."""
    generator, reference = token_teacher(), token_teacher()
    for each in (generator, reference):
        nn.init.normal_(each.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator.classes.weight.add_(0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
    codes, labels = torch.randint(16, (4, 6)), torch.tensor([0, 1, 1, 2])
    dropped = torch.tensor([False, False, False, True])
    own_class, other_class = (torch.where(dropped, 3, each) for each in (labels, labels.roll(-1)))
    ask = (generator.token_nll, reference.token_nll, codes, own_class, other_class)
    found = contrastive_loss(*ask, beta=0.5, weight=3.0)

    def ratio(condition):
        return (reference.token_nll(codes, condition) - generator.token_nll(codes, condition)).sum(1)

    own, other = ratio(torch.tensor([0, 1, 1, 3])), ratio(torch.tensor([1, 1, 2, 3]))
    second = -3 * F.logsigmoid(-0.5 * other)
    second[[1, 3]] = -F.logsigmoid(0.5 * other)[[1, 3]]
    assert torch.allclose(found["loss"], (-F.logsigmoid(0.5 * own) + second).mean() / 3, atol=1e-5)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    found["loss"].backward()
    assert all(weight.grad is None for weight in reference.parameters())
    optimizer.step()
    after = contrastive_loss(*ask, beta=0.5, weight=3.0)
    assert after["loss"] < found["loss"]
    assert after["margin"] > found["margin"]
