"""Both distillations on a teacher whose joint distribution is known exactly: minutes of toy training in all.

Total variation (TV) is measured on 20,000 samples, whose floor by chance is 0.02 to 0.03.
"""

import pytest
import torch
from tokar.models.distill import dd1, dd2
from tokar.models.distill.adapt import continuous, fit_embedding
from tokar.models.distill.ar_diffusion import ARDiffusion
from tokar.models.distill.cca import contrastive_loss
from tokar.models.distill.codebook import nearest
from tokar.models.distill.distilled import Helper
from tokar.models.distill.flow_map import TokenMap
from tokar.models.distill.token_student import TokenStudent
from tokar.models.distill.trajectory import follow
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.guidance import combine
from torch.nn import functional as F
from toy_teacher import TableTeacher, circle, distance, draw_levels, floor, normal

pytestmark = pytest.mark.slow
CODES = circle(4)
COUNT = 20_000
CLASS = torch.zeros(COUNT, dtype=torch.int64)


def test_the_joint_is_the_teachers():
    """T5, and T8's exact side: 100,000 trajectories are as near to the joint as so many draws can be."""
    teacher, count = TableTeacher(), 100_000
    codes = follow(teacher, torch.zeros(count, dtype=torch.int64), normal(0, count, 4, 2), TokenMap(CODES, steps=50))
    joint = teacher.joint()
    assert float(joint.sum()) == pytest.approx(1, abs=1e-5)
    assert distance(teacher.share(codes), joint) <= 1.3 * floor(joint, count)
    independent = teacher.independent()
    assert float(independent.sum()) == pytest.approx(1, abs=1e-5)
    assert distance(independent, joint) > 0.3


def network(n_tokens):
    torch.manual_seed(0)
    return NextToken(4, 1, n_tokens=n_tokens, dim=64, layers=2, heads=4, token_dropout=0, resid_dropout=0, ffn_dropout=0,
                     multiple_of=32)  # fmt: skip


def optimizer_of(*modules, lr, steps):
    optimizer = torch.optim.AdamW(
        [p for module in modules for p in module.parameters()], lr=lr, betas=(0.9, 0.95), weight_decay=0
    )
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)


def update(optimizer, schedule, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


@pytest.fixture(scope="module")
def dd1_student():
    """A student of 50,000 pairs, its teacher, and 20,000 held-out noises with the ends of their trajectories."""
    teacher, token_map, steps = TableTeacher(n_tokens=4), TokenMap(CODES, steps=50), 800
    noise = normal(0, 70_000, 4, 2)
    codes = follow(teacher, torch.zeros(70_000, dtype=torch.int64), noise, token_map)
    student = TokenStudent(network(4), embed_dim=2, timesteps=(0, 2), split=4)
    optimizer, schedule = optimizer_of(student, lr=2e-3, steps=steps)
    for _ in range(steps):
        rows = torch.randint(50_000, (256,))
        done = torch.tensor(student.timesteps)[torch.randint(2, (256,))]
        pending = student.pending(done)
        found = student(dd1.point(codes[rows], noise[rows], CODES, pending), CLASS[:256], done)
        update(optimizer, schedule, dd1.losses(found, codes[rows], CODES, pending)["loss"])
    return student.eval(), teacher, noise[50_000:], codes[50_000:]


def test_a_one_step_student_beats_every_independent_one(dd1_student):
    """T8, T9: the best that one step can do without dependence fails; the student stays within the bound of its accuracy."""
    student, teacher, noise, codes = dd1_student
    joint = teacher.joint()
    independent = distance(teacher.independent(), joint)
    assert independent > 0.3
    found = nearest(dd1.generate(student, CODES, CLASS, noise, steps=[0]), CODES)
    one = distance(teacher.share(found), joint)
    accuracy = float(dd1.sequence_accuracy(found, codes))
    print(f"independent {independent:.3f}  one step {one:.3f}  sequence accuracy {accuracy:.3f}")
    assert one < 0.15
    assert one <= 1 - accuracy + 0.03
    continuous_head = nearest(dd1.generate(student, CODES, CLASS, noise, steps=[0], split=0), CODES)
    assert distance(teacher.share(continuous_head), joint) < 0.2


def test_two_steps_and_the_teachers_help_come_closer(dd1_student):
    """T10."""
    student, teacher, noise, _ = dd1_student
    joint = teacher.joint()

    def away(vectors):
        return distance(teacher.share(nearest(vectors, CODES)), joint)

    one = away(dd1.generate(student, CODES, CLASS, noise, steps=[0]))
    two = away(dd1.generate(student, CODES, CLASS, noise))
    helper = Helper(teacher, 1, {})
    helped = {keep: away(dd1.assisted(student, CODES, CLASS, noise, helper=helper, keep=keep)) for keep in (1, 0)}
    print(f"one {one:.3f}  two {two:.3f}  helped {helped}")
    assert max(two, *helped.values()) < one - 0.01
    assert helped[0] < 0.08


@pytest.fixture(scope="module")
def diffusion():
    """An autoregressive diffusion model of a teacher of three tokens, by the ground-truth score; and the teacher."""
    teacher, steps = TableTeacher(n_tokens=3), 1200
    torch.manual_seed(0)
    backbone = continuous(network(3), embed_dim=2, hidden=64)
    table = 0.5 * torch.randn(4, 64)
    assert fit_embedding(backbone.tokens, table, CODES, steps=200, lr=1e-2) < 0.05 * table.square().sum(1).mean()
    model = ARDiffusion(backbone, embed_dim=2, width=64, depth=2)
    drawn = torch.multinomial(teacher.joint(), 20_000, replacement=True)
    codes = torch.stack([drawn // 16, drawn // 4 % 4, drawn % 4], dim=1)
    optimizer, schedule = optimizer_of(model, lr=2e-3, steps=steps)
    for _ in range(steps):
        part = codes[torch.randint(20_000, (256,))]
        tau, noise = draw_levels(4, F.embedding(part, CODES))
        score = dd2.TeacherScore(teacher.logits(part, CLASS), CODES)
        loss = dd2.ground_truth_score_loss(model, part, CLASS[:256], score, CODES, tau, noise)
        update(optimizer, schedule, loss)
    return model.eval(), teacher


def test_the_ground_truth_score_gives_back_the_teacher(diffusion):
    """T11."""
    model, teacher = diffusion
    noise = normal(1, COUNT, 3, 2)
    found = distance(teacher.share(model.sample(noise, CLASS, CODES, steps=20)), teacher.joint())
    print(f"autoregressive diffusion {found:.3f}")
    assert found < 0.06


def test_conditional_score_distillation_halves_the_distance(diffusion):
    """T12: from a one-step generator that is the model's own first step, by the SiD form."""
    import copy

    model, teacher = diffusion
    generator, fake = copy.deepcopy(model), copy.deepcopy(model)
    noise = normal(2, COUNT, 3, 2)

    def away():
        with torch.no_grad():
            return distance(teacher.share(nearest(generator.generate(noise, CLASS), CODES)), teacher.joint())

    def logits(prefix):
        return teacher.logits(nearest(prefix, CODES), CLASS)

    before, steps, label = away(), 400, CLASS[:256]
    torch.manual_seed(0)
    ours, our_schedule = optimizer_of(generator, lr=5e-4, steps=steps)
    theirs, their_schedule = optimizer_of(fake, lr=1e-3, steps=steps * 5)
    for _ in range(steps):
        for _ in range(5):
            with torch.no_grad():
                x = generator.generate(torch.randn(256, 3, 2), label)
            prefix = dd2.prefix_of(x, CODES, snap=True)
            loss = dd2.fake_score_loss(fake, x, prefix, label, *draw_levels(2, x))
            update(theirs, their_schedule, loss)
        start = torch.randn(256, 3, 2)
        tau, eps = draw_levels(2, start)
        fake.requires_grad_(False)
        x = generator.generate(start, label)
        update(ours, our_schedule, dd2.generator_loss(x, fake, logits, CODES, label, tau, eps, form="sid", snap=True))
        fake.requires_grad_(True)
    after = away()
    print(f"sid before {before:.3f} after {after:.3f}")
    assert before > 0.4
    assert after < before / 2


def test_without_guidance_an_aligned_generator_draws_like_its_guided_reference():
    """CCA, measured exactly: the joint distribution of two tokens under each of two classes."""
    import copy

    every, rows = torch.cartesian_prod(torch.arange(4), torch.arange(4)), torch.arange(256)
    torch.manual_seed(0)
    true = torch.distributions.Dirichlet(torch.full((16,), 0.7)).sample((2,))
    label = rows % 2
    generator = NextToken(4, 2, n_tokens=2, dim=64, layers=2, heads=4, token_dropout=0, resid_dropout=0, ffn_dropout=0,
                          multiple_of=32)  # fmt: skip

    def joint(model, guidance):
        """`[2, 16]`."""
        found = []
        for number in range(2):
            condition = torch.full((16,), number)
            logits = model.logits(every, condition), model.logits(every, model.null(condition))
            log_p = combine(*logits, guidance).log_softmax(-1)
            found.append(log_p.gather(2, every[..., None])[..., 0].sum(1).exp())
        return torch.stack(found).detach()

    def train(loss_of, steps, lr):
        optimizer, schedule = optimizer_of(generator, lr=lr, steps=steps)
        for _ in range(steps):
            codes = every[torch.multinomial(true[label], 1)[:, 0]]
            dropped = torch.rand(256) < 0.1
            update(optimizer, schedule, loss_of(codes, dropped))

    train(lambda codes, dropped: generator.loss(codes, torch.where(dropped, 2, label))["loss"], 400, 2e-3)
    reference = copy.deepcopy(generator).requires_grad_(False)

    def contrast(codes, dropped):
        own, other = (torch.where(dropped, 2, each) for each in (label, torch.randint(2, (256,))))
        return contrastive_loss(generator.token_nll, reference.token_nll, codes, own, other, beta=1, weight=1)["loss"]

    train(contrast, 300, 1e-3)
    guided = joint(reference, 2.0)
    before, after = ((joint(model, 1.0) - guided).abs().sum(1).max() / 2 for model in (reference, generator))
    print(f"to the guided teacher: before {before:.3f} after {after:.3f}")
    assert before > 0.1
    assert after < 0.8 * before
