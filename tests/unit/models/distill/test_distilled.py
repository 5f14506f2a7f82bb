"""The one door: every kind of distilled network through one call, what it costs, and which options are not its own."""

import pytest
import torch
from tokar.errors import UserError
from tokar.models.distill import dd1, dd2
from tokar.models.distill.adapt import continuous
from tokar.models.distill.ar_diffusion import ARDiffusion, euler_counts
from tokar.models.distill.codebook import nearest
from tokar.models.distill.distilled import Ask, Helper
from tokar.models.distill.one_step import OneStepGenerator
from tokar.models.distill.token_student import TokenStudent
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import Tally
from torch.nn import functional as F
from toy_teacher import normal

CODES, LABELS, IDS = normal(9, 16, 4), torch.tensor([0, 2, 1]), torch.arange(3)
DRY = {"token_dropout": 0, "resid_dropout": 0, "ffn_dropout": 0}


def teacher():
    torch.manual_seed(0)
    net = NextToken(16, 3, n_tokens=6, dim=32, layers=2, heads=2, **DRY).eval()
    torch.nn.init.normal_(net.head.weight)
    return net


def diffusion(role):
    backbone = continuous(teacher(), embed_dim=4, hidden=32)
    backbone.tokens.codebook.copy_(CODES)
    net = role(backbone, 4, width=32, depth=1)
    torch.nn.init.normal_(net.velocity_head.leave.weight, std=0.2)
    return net.eval()


MAKERS = {
    "student": lambda: TokenStudent(teacher(), 4, (0, 3), 6).eval(),
    "one_step": lambda: diffusion(OneStepGenerator),
    "diffusion": lambda: diffusion(ARDiffusion),
}


def helper():
    return Helper(teacher(), 7, {"guidance": 2.0})


CALLS = [
    ("student", {}, (2, 2, 2)),
    ("student", {"steps": [0]}, (1, 1, 1)),
    ("student", {"keep": 1, "teacher": helper}, (1 + 2 + 1, 1 + 4 + 1, 4)),
    ("student", {"keep": 0, "teacher": helper}, (3 + 1, 6 + 1, 4)),
    ("one_step", {}, (1, 1, 1)),
    ("one_step", {"redraw": 2, "teacher": helper}, (1 + 2, 1 + 4, 3)),
    ("diffusion", {}, (6, 6, 66)),
    ("diffusion", {"euler": "ramp:2,first=7"}, (6, 6, 6 + 7 + 6 + 5 + 4 + 3 + 2)),
]


@pytest.mark.parametrize(("kind", "options", "cost"), CALLS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_kind_is_drawn_by_one_call_and_says_what_it_cost(kind, options, cost):
    """A sample does not depend on its batch, a teacher's draws for it neither."""
    net, noise, tally = MAKERS[kind](), normal(1, 3, 6, 4), Tally()
    ask = Ask(**{name: value() if callable(value) else value for name, value in options.items()})
    found = net.draw(noise, LABELS, CODES, ask, IDS, tally)
    assert (tally.calls, tally.evaluations, tally.depth, tally.batches) == (*cost, 1)
    assert tuple(tally.per_image.values()) == cost
    assert torch.equal(found, F.embedding(nearest(found, CODES), CODES))
    alone = net.draw(noise[2:], LABELS[2:], CODES, ask, IDS[2:])
    assert torch.allclose(alone, found[2:], atol=1e-5)


def test_the_door_gives_what_the_samplers_give():
    noise = normal(2, 3, 6, 4)
    one = MAKERS["one_step"]()
    landed = one.generate(noise, LABELS).detach()
    part = one.draw(noise, LABELS, CODES, Ask(split=4), IDS)
    assert torch.equal(part[:, 4:], landed[:, 4:])
    assert torch.equal(part[:, :4], F.embedding(nearest(landed[:, :4], CODES), CODES))
    again = dd2.refine(helper(), landed, LABELS, CODES, 3, ids=IDS)
    assert torch.equal(one.draw(noise, LABELS, CODES, Ask(redraw=3, teacher=helper()), IDS), F.embedding(again, CODES))
    student = MAKERS["student"]()
    helped = dd1.assisted(student, CODES, LABELS, noise, helper=helper(), keep=1, ids=IDS)
    assert torch.equal(student.draw(noise, LABELS, CODES, Ask(keep=1, teacher=helper()), IDS), helped)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("student", {"euler": 3}, "student.euler: a student of Distilled Decoding 1 knows no such thing"),
        ("student", {"steps": [0, 2]}, "a step from 2 finished units, which this student was not trained for"),
        ("one_step", {"steps": [0]}, "it has student.split, student.redraw"),
        ("one_step", {"split": 7}, "7 of 6 units"),
        ("one_step", {"redraw": 2, "split": 1}, "every token becomes a code"),
        ("one_step", {"redraw": 7, "teacher": helper}, "7 of 6 units to draw anew"),
        ("one_step", {"redraw": 2}, "student.redraw: needs the teacher"),
        ("diffusion", {"split": 2}, "an autoregressive diffusion model knows no such thing"),
        ("diffusion", {"euler": 0.5}, "0.5 steps of a token"),
    ],
)
def test_what_is_not_its_own_is_refused(kind, options, message):
    ask = Ask(**{name: value() if callable(value) else value for name, value in options.items()})
    with pytest.raises(UserError, match=message):
        MAKERS[kind]().draw(normal(1, 3, 6, 4), LABELS, CODES, ask, IDS)


def test_steps_fall_as_in_disa():
    """`int((K-1-k)/(K-1)·(upper - lower)) + lower` of AR step k of K."""
    plan = teacher().plan
    last = plan.n_units - 1
    expected = [(last - unit) * (50 - 5) // last + 5 for unit in range(plan.n_units)]
    assert euler_counts("ramp:5,first=50", plan) == expected
    assert euler_counts(4, plan) == [4] * plan.n_units
