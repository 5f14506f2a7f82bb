import pytest
import torch
from tokar.errors import UserError
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import Tally, sample
from tokar.models.samplers.reveal import STRATEGIES, Inner, Offer, inner_for, offer_of

VOCAB, CLASSES, TOKENS = 20, 5, 16
SIZE = {"dim": 32, "layers": 2, "heads": 2, "multiple_of": 16}
CONDITION = torch.arange(7) % CLASSES
WAYS = [
    {},
    {"steps": 3},
    {"steps": "linear:4"},
    {"reveal": "threshold", "threshold": 0.3},
    {"reveal": "threshold", "threshold": 0.3, "steps": 4},
    {"reveal": "maskgit", "steps": 4, "temperature": 0.8, "top_k": 10},
    {"reveal": "first_hitting"},
    {"reveal": "entropy", "entropy_budget": 2.0},
    {"reveal": "adaptive", "threshold": 0.3, "entropy_budget": 0.5},
    {"sub_block": 3, "steps": 2},
    {"steps": 2, "pace": "cosine", "greedy": True},
]
GUIDANCE = [1.0, 2.0, {"kind": "interval", "value": 3.0, "start": 0.3, "stop": 0.7}]


def make(shift: bool = False, **changes: object) -> BlockDiffusion:
    torch.manual_seed(0)
    generator = BlockDiffusion(VOCAB, CLASSES, grid=(4, 4), **{"block_size": 8, "shift": shift, **SIZE, **changes})
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(generator.head.weight)
    return generator.eval()


GENERATORS = {shift: make(shift) for shift in (False, True)}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_cached_equals_uncached_in_any_batch(how: dict[str, object], guidance: object) -> None:
    generator = GENERATORS["steps" in how]
    choices = {"seed": 1, "guidance": guidance, **how}
    codes = sample(generator, CONDITION, **choices)
    assert 0 <= codes.min() <= codes.max() < VOCAB
    assert torch.equal(codes, sample(generator, CONDITION, cache=False, **choices))
    assert torch.equal(codes, sample(generator, CONDITION, max_batch=3, **choices))
    order = torch.tensor([6, 2])
    assert torch.equal(codes[order], sample(generator, CONDITION[order], sample_ids=order, **choices))


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_given_codes_stay_and_are_seen_from_the_start(how: dict[str, object]) -> None:
    generator = GENERATORS[False]
    free = sample(generator, CONDITION, seed=1, **how)
    given = torch.full((7, TOKENS), -1)
    given[:, 7] = 5
    given[2] = free[2]
    codes = sample(generator, CONDITION, seed=1, given=given, **how)
    assert torch.equal(codes[given >= 0], given[given >= 0])
    assert not torch.equal(codes[:, :7], free[:, :7])  # earlier in the same block


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ({}, 1 + 16),  # the class, a step for each token; the next block brings a clean one along
        ({"steps": 2}, 1 + 4),
        ({"steps": 1}, 1 + 2),
        ({"steps": {"kind": "linear", "first": 1, "value": 3}}, 1 + 3),  # 1 and, halfway, 2
        ({"sub_block": 4, "steps": 2}, 1 + 8),
        ({"sub_block": 4, "steps": 2, "sub_block_cache": True}, 1 + 8),
        ({"reveal": "threshold", "threshold": 0.0}, 1 + 2),
        ({"reveal": "threshold", "threshold": 1.0}, 1 + 16),
        ({"reveal": "entropy", "entropy_budget": 1e9}, 1 + 2),
        ({"reveal": "entropy", "entropy_budget": 0.0}, 1 + 16),
    ],
)
def test_calls_are_counted(how: dict[str, object], calls: int) -> None:
    tally = Tally()
    sample(GENERATORS[False], CONDITION, seed=0, tally=tally, max_batch=4, **how)
    assert (tally.calls, tally.batches, tally.calls_per_image) == (2 * calls, 2, calls)


@pytest.mark.parametrize(
    ("guidance", "passes"),
    [
        (1.0, [(4, 1), (4, 8), (4, 8), (4, 16), (4, 8)]),  # rows and slots: class, block, block, clean with the next, block
        (2.0, [(8, 1), (8, 8), (8, 8), (8, 16), (8, 8)]),  # both halves together, the clean pass too
        ("step:2,start=0.4", [(4, 1), (4, 8), (4, 8), (4, 8), (4, 9), (8, 8), (8, 8)]),  # the other half joins for block two
        ({"kind": "interval", "value": 2, "stop": 0.4}, [(8, 1), (8, 8), (8, 8), (4, 16), (4, 8)]),  # and leaves after one
    ],
    ids=str,
)
def test_rows_that_the_network_computes(guidance: object, passes: list[tuple[int, int]]) -> None:
    generator, seen = GENERATORS[False], list[tuple[int, int]]()
    hook = generator.transformer.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    sample(generator, CONDITION[:4], seed=0, guidance=guidance, steps=2)
    hook.remove()
    assert seen == passes


def test_calls_of_next_token() -> None:
    tally = Tally()
    generator = NextToken(VOCAB, CLASSES, grid=(4, 4), **SIZE)
    sample(generator, CONDITION, seed=0, tally=tally)
    assert tally.calls == TOKENS
    converted = make(shift=True, block_size=1)
    sample(converted, CONDITION, seed=0, tally=(converted_tally := Tally()))
    assert converted_tally.calls == TOKENS  # with shift and blocks of one the clean pass is the next-token step


def test_blocks_of_one_with_shift_draw_what_a_next_token_model_draws() -> None:
    source = NextToken(VOCAB, CLASSES, grid=(4, 4), **SIZE).eval()
    torch.nn.init.normal_(source.head.weight)
    converted = make(shift=True, block_size=1)
    converted.load_state_dict(converted.weights_from(source))
    for guidance in GUIDANCE:
        choices = {"seed": 0, "guidance": guidance, "greedy": True}
        assert torch.equal(sample(source, CONDITION, **choices), sample(converted, CONDITION, **choices))


def test_a_sub_block_alone_costs_less_and_is_near() -> None:
    """Of blocks that are one sub-block only the rest is missing: nothing; else it is an approximation, not another model."""
    generator = GENERATORS[False]
    whole = sample(generator, CONDITION, seed=3, sub_block=8, steps=4)
    assert torch.equal(sample(generator, CONDITION, seed=3, sub_block=8, steps=4, sub_block_cache=True), whole)
    parts = [sample(generator, CONDITION, seed=3, sub_block=4, steps=2, sub_block_cache=keep) for keep in (False, True)]
    assert (parts[0] == parts[1]).float().mean() > 0.3


def inner(**changes: object) -> Inner:
    return inner_for(GENERATORS[False], changes)


def offer(confidence: list[float], entropy: list[float] | None = None, filled: tuple[int, ...] = (), due: int = 1) -> Offer:
    hidden = torch.ones(1, len(confidence), dtype=torch.bool)
    hidden[:, list(filled)] = False
    noise = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2]])[:, : len(confidence)]
    entropies = torch.tensor([entropy if entropy is not None else [-c for c in confidence]])
    return Offer(hidden, torch.tensor([confidence]), entropies, noise, due, 0.5)


def chosen(found: torch.Tensor) -> list[int]:
    return found[0].nonzero()[:, 0].tolist()


CONFIDENCE = [0.9, 0.2, 0.95, 0.5, 0.4]


@pytest.mark.parametrize(
    ("how", "offered", "expected"),
    [
        ({}, offer(CONFIDENCE, due=2), [0, 2]),
        ({}, offer(CONFIDENCE, filled=(2,), due=2), [0, 3]),
        ({"reveal": "threshold", "threshold": 0.45}, offer(CONFIDENCE), [0, 2, 3]),
        ({"reveal": "threshold", "threshold": 0.45}, offer(CONFIDENCE, filled=(0,), due=4), [1, 2, 3, 4]),
        ({"reveal": "threshold", "threshold": 0.99}, offer(CONFIDENCE), [2]),
        ({"reveal": "maskgit", "reveal_noise": 0.0}, offer(CONFIDENCE, due=2), [0, 2]),
        ({"reveal": "maskgit", "reveal_noise": 100.0}, offer(CONFIDENCE, due=2), [1, 2]),
        ({"reveal": "first_hitting"}, offer(CONFIDENCE), [1]),
        ({"reveal": "first_hitting"}, offer(CONFIDENCE, filled=(1,)), [2]),
        ({"reveal": "entropy", "entropy_budget": 1.0}, offer(CONFIDENCE, [3.0, 0.5, 0.4, 2.0, 2.5]), [1, 2, 3]),
        ({"reveal": "entropy", "entropy_budget": 0.0}, offer(CONFIDENCE, [3.0, 0.5, 0.4, 2.0, 2.5]), [2]),
        ({"reveal": "entropy", "entropy_budget": 9.0}, offer(CONFIDENCE, [3.0] * 5, filled=(4,)), [0, 1, 2, 3]),
        ({"reveal": "adaptive", "threshold": 0.1, "entropy_budget": 0.2}, offer(CONFIDENCE, [0.0, 0.0, 0.0, 3.0, 3.0]), [0, 1]),
        ({"reveal": "adaptive", "threshold": 0.97, "entropy_budget": 0.2}, offer(CONFIDENCE, [0.0, 0.0, 0.0, 3.0, 3.0]), [0]),
        ({"reveal": "adaptive", "threshold": 0.97, "entropy_budget": 9.0}, offer(CONFIDENCE, [0.0, 0.0, 0.0, 3.0, 3.0]), [2]),
    ],
)
def test_strategies_by_definition(how: dict[str, object], offered: Offer, expected: list[int]) -> None:
    assert chosen(inner(**how).choose(offered)) == expected


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_strategy_reveals_what_is_due_and_nothing_twice(kind: str) -> None:
    torch.manual_seed(0)
    for due in (1, 3, 8):
        hidden = torch.rand(50, 8) < 0.6
        offered = Offer(hidden, torch.rand(50, 8), torch.rand(50, 8) * 3, torch.rand(50, 8), due, 0.5)
        found = inner(reveal=kind).choose(offered)
        assert not (found & ~hidden).any()
        assert (found.sum(1) >= hidden.sum(1).clamp(max=due)).all()


def test_an_offer_knows_confidence_and_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, -torch.inf, -torch.inf]]]).clamp_min(-80)
    made = offer_of(logits, torch.tensor([[3, 0]]), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), 2.0, 1, 0.0)
    p = torch.tensor(1.0).sigmoid().item()
    assert made.confidence[0].tolist() == pytest.approx([0.25, p])
    assert made.entropy[0].tolist() == pytest.approx([1.386294, 0.582203], abs=1e-5)


def test_dues() -> None:
    assert inner(steps=4).dues(0, 8) == [2, 2, 2, 2]
    assert inner(steps=3).dues(0, 8) == [3, 3, 2]
    assert inner().dues(0, 3) == [1, 1, 1]
    assert inner(steps=99).dues(0, 3) == [1, 1, 1]
    cosine = inner(steps=8, pace="cosine").dues(0, 64)
    assert sum(cosine) == 64
    assert cosine == sorted(cosine)
    for steps in range(1, 9):
        for pace in ("uniform", "cosine"):
            dues = inner(steps=steps, pace=pace).dues(0, 8)
            assert sum(dues) == 8
            assert len(dues) == steps
            assert min(dues) >= 1


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"reveal": "confident"}, "did you mean 'confidence'"),
        ({"threshold": 0.5}, "reveal=confidence does not read it"),
        ({"reveal": "threshold", "entropy_budget": 1.0}, "set reveal=entropy"),
        ({"steps": 0}, "use 1 or more"),
        ({"steps": "never"}, "not a number"),
        ({"pace": "slow"}, "no pace"),
        ({"sub_block_cache": True}, "set sub_block"),
        ({"sub_block": -1}, "negative"),
        ({"reveal": "maskgit", "reveal_noise": -1.0}, "negative"),
        ({"sub_block": 4, "sub_block_cache": True, "cache": False}, "without a cache"),
    ],
)
def test_mistakes_are_one_line(how: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        sample(GENERATORS[False], CONDITION, seed=0, **how)


@pytest.mark.parametrize("how", [{"steps": 4}, {"reveal": "maskgit"}, {"sub_block": 4}, {"sub_block_cache": True}])
def test_a_generator_without_inner_steps_refuses_them(how: dict[str, object]) -> None:
    generator = NextToken(VOCAB, CLASSES, grid=(4, 4), **SIZE)
    with pytest.raises(UserError, match="a NextToken reveals a unit in one step"):
        sample(generator, CONDITION, seed=0, **how)


def test_settings_left_out_mean_nothing_to_it() -> None:
    generator = NextToken(VOCAB, CLASSES, grid=(4, 4), **SIZE)
    plain = sample(generator, CONDITION, seed=0)
    assert torch.equal(
        sample(generator, CONDITION, seed=0, steps=None, reveal=None, sub_block=None, sub_block_cache=False), plain
    )
