"""Students: what they see, what they take over, how they are sampled, what is refused."""

import itertools

import pytest
import torch
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.distill import dd1
from tokar.models.distill.codebook import nearest
from tokar.models.distill.distilled import Helper
from tokar.models.distill.scale_student import ScaleStudent
from tokar.models.distill.student import Prediction
from tokar.models.distill.students import student_node, without_dropout
from tokar.models.distill.token_student import TokenStudent
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import Tally
from torch.nn import functional as F
from toy_teacher import normal

GRIDS = [[1, 1], [2, 2], [3, 3]]
SIZES = {"dim": 32, "layers": 2, "heads": 2}
DRY = {"token_dropout": 0, "resid_dropout": 0, "ffn_dropout": 0}
CODEBOOK = normal(9, 16, 4)


def token_teacher(**more):
    return NextToken(16, 3, grid=(3, 4), **SIZES, **DRY, **more)


def scale_teacher(**more):
    return NextScale(16, 3, GRIDS, 4, **SIZES, gate_init=0.5, **more)


STUDENTS = {
    "llamagen": lambda: TokenStudent(token_teacher(), 4, (0, 5), 5),
    "gigatok": lambda: TokenStudent(token_teacher(positions="learned", modulation="block"), 4, (0, 5), 5),
    "d_ar": lambda: TokenStudent(NextToken(16, 3, n_tokens=12, positions="rotary_class", **SIZES, **DRY), 4, (0, 5), 5),
    "var": lambda: ScaleStudent(scale_teacher(), (0, 2), 2),
    "var_shared": lambda: ScaleStudent(scale_teacher(shared_modulation=True, qk_l2=False), (0, 2), 2, flag_layers=False),
}


@pytest.fixture(params=STUDENTS)
def student(request):
    torch.manual_seed(0)
    built = STUDENTS[request.param]()
    with torch.no_grad():
        for weight in built.parameters():  # what begins at zero would hide what it depends on
            weight.add_(0.1 * torch.randn_like(weight))
    return built.eval()


def test_a_token_sees_earlier_units_and_itself(student):
    """T7: another noise at token j changes j and what comes in later units, nothing else; siblings of a scale stay blind."""
    tokens, labels, done = student.plan.n_tokens, torch.tensor([1]), torch.tensor([0])
    noise = normal(0, 1, tokens, 4)
    with torch.no_grad():
        before = student(noise, labels, done)
        for token in range(tokens):
            moved = noise.clone()
            moved[0, token] += 1
            after = student(moved, labels, done)
            for old, new in zip(before, after, strict=True):
                changed = (old - new).abs().amax(-1)[0] > 1e-6
                unit = student.plan.revealed_at
                expected = [other == token or unit[other] > unit[token] for other in range(tokens)]
                assert changed.tolist() == expected


def test_flags_and_classes_matter(student):
    vectors = normal(1, 2, student.plan.n_tokens, 4)
    zero = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        plain = student(vectors, zero, zero)
        for other in (student(vectors, zero + 1, zero), student(vectors, zero, zero + student.tokens_in(student.timesteps[1]))):
            assert all((a - b).abs().amax(-1).min() > 1e-6 for a, b in zip(plain, other, strict=True))
    assert student.flag_rows(torch.tensor([0, 3])).tolist()[1] == [1] * 4 + [0] * (student.plan.n_tokens - 3)


@pytest.mark.parametrize("kind", ["token", "scale"])
def test_it_begins_with_the_teachers_weights(kind):
    torch.manual_seed(0)
    teacher = token_teacher() if kind == "token" else scale_teacher()
    torch.manual_seed(1)
    student = STUDENTS["llamagen" if kind == "token" else "var"]()
    taken, theirs = student.weights_from(teacher), teacher.state_dict()
    student.load_state_dict(taken)
    new = {"token": ("flags.", "vector_head.", "embed."), "scale": ("flags.", "vector_head.", "flag_layers.")}[kind]
    for name, value in taken.items():
        if name in ("positions", "levels.weight", "start"):
            assert torch.equal(value[0], theirs[name][0])
            assert torch.equal(value[2:], theirs[name][1:])  # the row of the first scale is new
        elif not name.startswith(new):
            assert torch.equal(value, theirs[name]), name
    wide = NextToken(16, 3, grid=(3, 4), dim=64, layers=2, heads=2) if kind == "token" else scale_teacher(qk_l2=False)
    if kind == "token":
        with pytest.raises(UserError, match="of this teacher is"):
            student.weights_from(wide)


def test_losses_count_pending_tokens_alone():
    codes = torch.randint(16, (2, 5))
    pending = torch.tensor([[False, False, True, True, True], [True] * 5])
    vectors, logits = F.embedding(codes, CODEBOOK), 20.0 * F.one_hot(codes, 16)
    right = dd1.losses(Prediction(logits, vectors), codes, CODEBOOK, pending)
    assert float(right["loss"]) < 1e-6
    assert float(right["accuracy"]) == 1
    wrong = torch.where(pending[..., None], vectors, vectors + 7)
    assert float(dd1.losses(Prediction(logits, wrong), codes, CODEBOOK, pending)["vector"]) == 0
    found = dd1.losses(
        Prediction(logits, vectors + 1), codes, CODEBOOK, pending, vector_weight=0.5,
        perceptual=lambda ours, true: (ours - true).abs().sum(), perceptual_weight=2.0,
    )  # fmt: skip
    assert float(found["vector"]) == pytest.approx(4)
    assert float(found["perceptual"]) == pytest.approx(8 * 4, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(0.5 * 4 + 2 * 32, rel=1e-5)
    unsure, far = torch.randn(2, 5, 16), vectors + torch.randn(2, 5, 4)
    whole = dd1.losses(Prediction(unsure, far), codes, CODEBOOK, pending)
    rows = [slice(0, 1), slice(1, 2)]
    parts = [dd1.losses(Prediction(unsure[row], far[row]), codes[row], CODEBOOK, pending[row]) for row in rows]
    for name, value in whole.items():  # whatever the micro-batches and the ranks
        assert float(value) == pytest.approx(sum(float(part[name]) for part in parts) / 2, rel=1e-5)


def test_points_and_compositions(student):
    """Data is copied, before the split as its nearest code; the rest comes from the head that the split says."""
    tokens, step = student.plan.n_tokens, student.timesteps[1]
    known, codes = student.tokens_in(step), torch.randint(16, (2, tokens))
    noise, done = normal(2, 2, tokens, 4), torch.full((2,), known)
    point = dd1.point(codes, noise, CODEBOOK, student.pending(done))
    assert torch.equal(point[:, :known], F.embedding(codes, CODEBOOK)[:, :known])
    assert torch.equal(point[:, known:], noise[:, known:])
    near = point.clone()
    near[:, :known] += 1e-3
    prediction = Prediction(torch.randn(2, tokens, 16), torch.randn(2, tokens, 4))
    for split in range(student.plan.n_units + 1):
        found, snapped = dd1.compose(student, prediction, near, CODEBOOK, step, split), student.tokens_in(split)
        assert torch.equal(found[:, : min(known, snapped)], point[:, : min(known, snapped)])
        assert torch.equal(found[:, snapped:known], near[:, snapped:known])
        late = slice(max(known, snapped), None)
        assert torch.equal(found[:, late], prediction.vectors[:, late])
        chosen = F.embedding(prediction.logits.argmax(-1), CODEBOOK)
        assert torch.equal(found[:, known:snapped], chosen[:, known:snapped])


def test_no_more_is_computed_than_is_used(student):
    """The pass that samplers take says what both heads over all tokens say, for every split."""
    tokens, labels, noise = student.plan.n_tokens, torch.tensor([0, 2]), normal(5, 2, student.plan.n_tokens, 4)
    start = F.embedding(torch.randint(16, (2, tokens)), CODEBOOK)
    for step, split in itertools.product(student.timesteps, range(student.plan.n_units + 1)):
        done = torch.full((2,), student.tokens_in(step))
        point = torch.where(student.pending(done)[..., None], noise, start)
        with torch.no_grad():
            slow = dd1.compose(student, student(point, labels, done), point, CODEBOOK, step, split)
        fast = dd1.generate(student, CODEBOOK, labels, noise, steps=[step], split=split, start=start)
        assert torch.allclose(fast, slow, atol=1e-5)


def test_steps_and_their_cost(student):
    """T14: passes are counted, those of the teacher's guidance twice; the second step keeps what the first one made."""
    labels, noise, tally = torch.tensor([0, 2]), normal(3, 2, student.plan.n_tokens, 4), Tally()
    one = dd1.generate(student, CODEBOOK, labels, noise, steps=[0], tally=tally)
    assert (tally.calls, tally.evaluations, tally.batches) == (1, 1, 1)
    two = dd1.generate(student, CODEBOOK, labels, noise, tally=tally)
    assert (tally.calls, tally.evaluations, tally.batches) == (3, 3, 2)
    known = student.tokens_in(student.timesteps[1])
    assert torch.allclose(one[:, :known], two[:, :known])
    assert not torch.allclose(one[:, known:], two[:, known:])
    codes = dd1.generate(student, CODEBOOK, labels, noise, split=student.plan.n_units)
    assert torch.equal(codes, F.embedding(nearest(codes, CODEBOOK), CODEBOOK))


def test_the_teacher_draws_between_two_steps():
    torch.manual_seed(0)
    teacher, student = token_teacher().eval(), STUDENTS["llamagen"]().eval()
    torch.nn.init.normal_(teacher.head.weight)
    labels, noise = torch.tensor([0, 2]), normal(4, 2, 12, 4)
    ask = {"codebook": CODEBOOK, "condition": labels, "noise": noise, "helper": Helper(teacher, 1, {"guidance": 2.0})}
    for keep, calls in ((0, 5 + 1), (2, 1 + 3 + 1), (4, 1 + 1 + 1)):
        tally = Tally()
        found = dd1.assisted(student, keep=keep, tally=tally, **ask)
        assert (tally.calls, tally.evaluations) == (calls, calls + 5 - keep)
        first = dd1.generate(student, CODEBOOK, labels, noise, steps=[0], split=12)
        assert torch.equal(found[:, :keep], first[:, :keep])
        again = dd1.generate(student, CODEBOOK, labels, noise, steps=[5], start=found)
        assert torch.allclose(found, again)
    with pytest.raises(UserError, match="5 units kept, and the student goes on from 5"):
        dd1.assisted(student, keep=5, **ask)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 3], "a step from 3 finished units, which this student was not trained for"),
        ([5, 0], "do not rise"),
        ([5], "nothing before it"),
        ([], "do not rise"),
    ],
)
def test_steps_it_was_not_trained_for_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        dd1.generate(STUDENTS["llamagen"](), CODEBOOK, torch.tensor([0]), normal(0, 1, 12, 4), steps=steps)


def test_sequences_are_equal_or_not():
    codes = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    other = torch.tensor([[1, 2], [3, 0], [5, 6], [0, 0]])
    assert float(dd1.sequence_accuracy(codes, other)) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenStudent(scale_teacher(), 4, (0,), 1), "is made from a NextToken, not from a NextScale"),
        (lambda: ScaleStudent(token_teacher(), (0,), 1), "is made from a NextScale, not from a NextToken"),
        (lambda: ScaleStudent(scale_teacher(), (0, 3), 1), r"timesteps \[0, 3\] of 3 units"),
        (lambda: ScaleStudent(scale_teacher(), (1,), 1), "give 0 and rising numbers"),
        (lambda: ScaleStudent(scale_teacher(), (0, 2), 4), "split 4 of 3 units"),
    ],
)
def test_students_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_student_drops_nothing_whatever_its_teacher_did():
    teacher = {
        "_target_": "tokar.models.generators.next_token.NextToken",
        "vocab_size": 16,
        "num_classes": 3,
        "grid": [3, 4],
        **SIZES,
    }
    student = build(student_node({**teacher, "token_dropout": 0.3, "drop_path": 0.2}, build(teacher), 4, (0, 5), 5)).train()
    given = (normal(0, 2, 12, 4), torch.tensor([0, 1]), torch.tensor([0, 5]))
    assert torch.equal(student(*given).logits, student(*given).logits)
    scales = {"_target_": "tokar.models.generators.next_scale.NextScale", "drop_path": 0.1, "vocab_size": 16}
    assert without_dropout(scales) == {**scales, "drop_path": 0.0}
