import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.errors import UserError
from tokar.models.generators import planned
from tokar.models.generators.base import Generator
from tokar.models.generators.conditions import PADDING, SEEN, TextCondition, pack_text
from tokar.models.generators.next_token import SIZES, NextToken
from tokar.models.generators.static_step import static_step
from tokar.models.samplers.decode import sample

GRID, TOKENS, VOCAB = (3, 4), 12, 20


def make(**changes: object) -> NextToken:
    torch.manual_seed(0)
    arguments = {"grid": GRID, "dim": 32, "layers": 2, "heads": 2, "multiple_of": 16, **changes}
    generator = NextToken(VOCAB, **{"num_classes": 5, **arguments})
    torch.nn.init.normal_(generator.head.weight)
    return generator.eval()


GENERATOR = make()
ROW = {"grid": None, "n_tokens": TOKENS}
KINDS = {
    "LlamaGen": {},
    "LlamaGen on a row": ROW,
    "D-AR": {**ROW, "positions": "rotary_class"},
    "GigaTok": {**ROW, "positions": "learned"},
    "GigaTok, qk norm": {**ROW, "positions": "learned", "qk_norm": True},
    "GigaTok, adaLN": {**ROW, "positions": "learned", "modulation": "block"},
    "GigaTok, shared adaLN": {**ROW, "positions": "learned", "modulation": "shared"},
    "LlamaGen of texts": {"num_classes": 0, "condition": True},
    "learned places of texts": {**ROW, "positions": "learned", "num_classes": 0, "condition": True},
}


def make_kind(name: str) -> NextToken:
    """Of every kind one, its parameters drawn so that nothing is zero."""
    changes = dict(KINDS[name])
    if changes.pop("condition", False):
        changes["condition"] = TextCondition(32, 6, 4)
    generator = make(**changes)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator


def texts() -> torch.Tensor:
    """Of 3, 1 and 4 features."""
    return pack_text(torch.randn(3, 5, 6), torch.tensor([3, 1, 5]), 4)


def conditions(generator: NextToken) -> torch.Tensor:
    return torch.tensor([0, 5, 2]) if generator.text is None else texts()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_a_cache_give_the_full_pass(kind: str) -> None:
    generator = make_kind(kind)
    codes, condition = torch.randint(VOCAB, (3, TOKENS)), conditions(generator)
    full = generator.logits(codes, condition)
    state = generator.begin(condition)
    for unit in range(TOKENS):
        stepped = generator.propose(state, unit)
        torch.testing.assert_close(stepped[:, 0], full[:, unit], atol=1e-5, rtol=0)
        for recompute in (NextToken.recompute, Generator.recompute):
            torch.testing.assert_close(recompute(generator, codes, condition, unit), stepped, atol=1e-5, rtol=0)
        generator.commit(state, unit, codes[:, unit : unit + 1])


def test_a_unit_proposed_twice_changes_nothing() -> None:
    state = GENERATOR.begin(torch.tensor([1]))
    for unit in range(3):
        once = GENERATOR.propose(state, unit)
        assert torch.equal(GENERATOR.propose(state, unit), once)
        GENERATOR.commit(state, unit, torch.tensor([[unit]]))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shape_steps_equal_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that torch.compile gets, run uncompiled."""
    monkeypatch.setattr(planned, "compiled_step", lambda: static_step)
    generator = make_kind(kind)
    codes, condition = torch.randint(VOCAB, (3, TOKENS)), conditions(generator)
    full, state = generator.logits(codes, condition), generator.begin(condition, compile=True)
    for unit in range(TOKENS):
        torch.testing.assert_close(generator.propose(state, unit)[:, 0], full[:, unit], atol=1e-5, rtol=0)
        generator.commit(state, unit, codes[:, unit : unit + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_late_are_as_if_there_from_the_start(kind: str) -> None:
    generator = make_kind(kind)
    codes, condition = torch.randint(VOCAB, (2, TOKENS)), conditions(generator)[:2]
    for late in (0, 1, 7):
        state = generator.begin(condition[:1], capacity=2)
        for unit in range(late):
            generator.propose(state, unit)
            generator.commit(state, unit, codes[:1, unit : unit + 1])
        generator.join(state, condition[1:], codes[1:], late)
        expected = generator.recompute(codes, condition, late)
        torch.testing.assert_close(generator.propose(state, late), expected, atol=1e-5, rtol=0)
        generator.keep(state, 1)
        torch.testing.assert_close(generator.propose(state, late), expected[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_guided_samples_with_and_without_cache(kind: str) -> None:
    """Guidance that begins late: the unconditional rows join in the middle."""
    generator = make_kind(kind)
    options = {"seed": 3, "guidance": "step:2.5,start=0.4"}
    condition = conditions(generator)
    fast, slow, alone = (sample(generator, condition, **options, **how) for how in ({}, {"cache": False}, {"max_batch": 1}))
    assert torch.equal(fast, slow)
    assert torch.equal(fast, alone)


def test_text_that_is_not_there_is_not_seen() -> None:
    """What lies in the padding moves no logit; what is text does, from the first code on."""
    generator, condition = make_kind("LlamaGen of texts"), texts()[:1]
    codes = torch.randint(VOCAB, (1, TOKENS))
    assert condition[0, :, -1].tolist() == [PADDING, SEEN, SEEN, SEEN]
    logits = generator.logits(codes, condition)
    for slot, moved in ((0, False), (1, True), (3, True)):
        changed = condition.clone()
        changed[0, slot, :-1] += 1
        difference = (generator.logits(codes, changed) - logits).abs().amax(-1)[0]
        assert (difference > 1e-6).all() if moved else (difference == 0).all()


def test_no_text_is_learned_and_keeps_the_padding() -> None:
    generator, condition = make_kind("LlamaGen of texts"), texts()
    null = generator.null(condition)
    assert torch.equal(generator.null(null), null)
    assert torch.equal(generator.condition.padding(null), generator.condition.padding(condition))
    other = null.clone()
    other[..., :-1] = 7.0
    codes = torch.randint(VOCAB, (3, TOKENS))
    assert torch.equal(generator.logits(codes, null), generator.logits(codes, other))
    generator(codes, null)["loss"].backward()
    assert generator.condition.nothing.grad.abs().sum() > 0


def test_a_row_of_a_class_means_no_class() -> None:
    assert GENERATOR.null(torch.tensor([0, 3])).tolist() == [5, 5]


def test_conditions_of_the_other_kind_are_refused() -> None:
    text = make_kind("LlamaGen of texts")
    with pytest.raises(UserError, match="give prompts instead of classes"):
        sample(text, torch.tensor([0]), seed=0)
    with pytest.raises(UserError, match="give classes instead of prompts"):
        sample(GENERATOR, texts(), seed=0)
    with pytest.raises(UserError, match="4 tokens x 5, the generator reads 4 x 6"):
        sample(text, texts()[..., 1:], seed=0)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, TOKENS - 1), value=st.integers(0, VOCAB - 1), seed=st.integers(0, 1000))
def test_no_leak(position: int, value: int, seed: int) -> None:
    """A changed code moves no logit of itself or of an earlier code, and moves every later one."""
    codes = torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    changed = codes.clone()
    changed[0, position] = value
    with torch.no_grad():
        before, after = (GENERATOR.logits(sequence, torch.tensor([2])) for sequence in (codes, changed))
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    if value != codes[0, position] and position + 1 < TOKENS:
        assert (before[:, position + 1 :] != after[:, position + 1 :]).any(dim=-1).all()


def test_the_class_matters_to_every_token() -> None:
    codes = torch.randint(VOCAB, (1, TOKENS))
    one, other = (GENERATOR.logits(codes, torch.tensor([label])) for label in (0, GENERATOR.null_class))
    assert (one != other).any(dim=-1).all()


def test_loss_is_the_mean_cross_entropy() -> None:
    codes, condition = torch.randint(VOCAB, (3, TOKENS)), torch.tensor([0, 1, 2])
    logits = GENERATOR.logits(codes, condition)
    expected = torch.stack([F.cross_entropy(logits[:, token], codes[:, token]) for token in range(TOKENS)]).mean()
    torch.testing.assert_close(GENERATOR(codes, condition)["loss"], expected)
    assert torch.equal(GENERATOR(codes.int(), condition)["loss"], GENERATOR(codes, condition)["loss"])


def test_a_fresh_model_predicts_uniformly() -> None:
    torch.manual_seed(0)
    generator = NextToken(VOCAB, 5, grid=GRID, dim=64, layers=1, heads=2)
    loss = generator(torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1]))["loss"]
    torch.testing.assert_close(loss, torch.tensor(float(VOCAB)).log())
    for name in ("tokens", "classes"):
        assert abs(getattr(generator, name).weight.std().item() - 0.02) < 0.003


def test_dropout_only_while_training() -> None:
    generator, codes, condition = make(), torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1])
    assert torch.equal(generator.logits(codes, condition), generator.logits(codes, condition))
    generator.train()
    assert not torch.equal(generator.logits(codes, condition), generator.logits(codes, condition))


def test_training_after_sampling() -> None:
    """Tables born while sampling must not be inference tensors: autograd refuses those."""
    generator = make()
    sample(generator, torch.tensor([0]), seed=0)
    generator.train()
    generator(torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1]))["loss"].backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_state_holds_parameters_only() -> None:
    assert set(GENERATOR.state_dict()) == {name for name, _ in GENERATOR.named_parameters()}
    assert torch.equal(copy.deepcopy(GENERATOR).head.weight, GENERATOR.head.weight)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("B", 110.9), ("L", 342.9), ("XL", 774.7), ("XXL", 1411), ("1B", 1199.6), ("3B", 3096.7), ("7B", 6614.6)],
)
def test_published_sizes(size: str, millions: float) -> None:
    dim, layers, heads = SIZES[size]
    with torch.device("meta"):
        generator = NextToken(16384, 1000, grid=(16, 16), dim=dim, layers=layers, heads=heads)
    count = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.5 if millions == 1411 else 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 12}, "exactly one of grid"),
        ({"grid": None}, "exactly one of grid"),
        ({"heads": 3}, "3 heads do not divide the width 32"),
        ({"dim": 12}, "a head is 6 wide; 2-D rotary positions need a multiple of 4"),
        ({**ROW, "dim": 6, "positions": "rotary_class"}, "a head is 3 wide; 1-D rotary positions need a multiple of 2"),
        ({"num_classes": 0}, "no classes and no condition"),
        ({"condition": TextCondition(16, 6, 4)}, "a condition of width 16 in a generator of width 32"),
        ({"condition": torch.nn.Identity()}, "Identity reads no condition"),
        ({"condition": TextCondition(32, 6, 4), "modulation": "block"}, "texts do not modulate"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
