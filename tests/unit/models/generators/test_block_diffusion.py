import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.conf.overrides import ROOT
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.generators import block_steps
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.masking import LEAST, WINDOWS, BlockMask, calmest_window, window_moments
from tokar.models.generators.next_token import NextToken
from tokar.models.generators.static_step import static_step
from tokar.train.randomness import sample_uniforms

TOKENS, VOCAB, CLASSES = 12, 20, 5
SIZE = {"dim": 32, "layers": 2, "heads": 2, "multiple_of": 16, "token_dropout": 0, "resid_dropout": 0, "ffn_dropout": 0}
BLOCKS = {
    "chunks": {"grid": (3, 4), "block_size": 3},
    "ragged": {"grid": (3, 4), "block_size": 5},
    "rows": {"grid": (3, 4), "block": "rows", "block_size": 1},
    "tiles": {"grid": (2, 6), "block": "tiles", "block_size": 2},
    "scales": {"n_tokens": 12, "grids": [[1, 1], [1, 2], [3, 3]], "block": "scales"},
    "one": {"n_tokens": 12, "block_size": 12},
    "learned": {"n_tokens": 12, "block_size": 4, "positions": "learned", "modulation": "shared", "qk_norm": True},
    "D-AR": {"n_tokens": 12, "block_size": 4, "positions": "rotary_class"},
}
CODES, CONDITION = torch.randint(VOCAB, (3, TOKENS), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 2])


def wake(generator: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def make(kind: str = "chunks", **changes: object) -> BlockDiffusion:
    torch.manual_seed(0)
    return wake(BlockDiffusion(VOCAB, CLASSES, **{**SIZE, **BLOCKS[kind], **changes}))


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed shapes"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_steps_with_a_cache_give_the_pass_over_both_streams(
    kind: str, shift: bool, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass over a block brings the block before into the cache."""
    monkeypatch.setattr(block_steps, "compiled_step", lambda: static_step)
    generator = make(kind, shift=shift)
    full = generator.logits(CODES, CONDITION)
    state = generator.begin(CONDITION, compile=fixed)
    for unit in range(generator.plan.n_units):
        columns = list(generator.plan.tokens(unit))
        filled = CODES[:, columns].masked_fill(torch.rand(3, len(columns)) < 0.5, -1)
        expected = generator.refine_anew(CODES, CONDITION, unit, filled)
        torch.testing.assert_close(generator.refine(state, unit, filled), expected, atol=1e-5, rtol=0)
        for window in (slice(0, 1), slice(len(columns) // 2, len(columns))):
            part = generator.refine(state, unit, filled, window)
            torch.testing.assert_close(part, expected[:, window], atol=1e-5, rtol=0)
        torch.testing.assert_close(generator.propose(state, unit), full[:, columns], atol=1e-5, rtol=0)
        generator.commit(state, unit, CODES[:, columns])


def test_proposing_leaves_no_trace_in_the_cache() -> None:
    generator = make("chunks")
    state = generator.begin(CONDITION)
    generator.commit(state, 0, CODES[:, :3])
    generator.refine(state, 1, CODES[:, 3:6].flip(0))
    length, keys = state.cache.length, state.cache.keys.clone()
    generator.refine(state, 1, CODES[:, 3:6])
    assert state.cache.length == length == 4
    assert torch.equal(state.cache.keys[:, :, :, :length], keys[:, :, :, :length])
    assert torch.equal(state.cache.keys[:, :, :, length + 3 :], keys[:, :, :, length + 3 :])


@pytest.mark.parametrize("shift", [False, True])
def test_rows_that_join_late_are_as_if_there_from_the_start(shift: bool) -> None:
    generator = make("tiles", shift=shift)
    codes = CODES[:2]
    for late in (0, 1, 2):
        state = generator.begin(torch.tensor([1]), capacity=2)
        for unit in range(late):
            generator.commit(state, unit, codes[:1, list(generator.plan.tokens(unit))])
        generator.join(state, torch.tensor([4]), codes[1:], late)
        expected = generator.recompute(codes, torch.tensor([1, 4]), late)
        torch.testing.assert_close(generator.propose(state, late), expected, atol=1e-5, rtol=0)
        if late + 1 < generator.plan.n_units:  # the block that waits for the next pass is kept for the rows that stay
            generator.commit(state, late, codes[:, list(generator.plan.tokens(late))])
            late += 1
            expected = generator.recompute(codes, torch.tensor([1, 4]), late)
        generator.keep(state, 1)
        torch.testing.assert_close(generator.propose(state, late), expected[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
@settings(max_examples=25, deadline=None)
@given(position=st.integers(0, TOKENS - 1), value=st.integers(0, VOCAB - 1), seed=st.integers(0, 99))
def test_no_leak(shift: bool, position: int, value: int, seed: int) -> None:
    """A changed code moves no logit of its own block or of an earlier one, and every later one."""
    generator = GENERATORS[shift]
    codes = torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    changed = codes.clone()
    changed[0, position] = value
    condition = torch.tensor([1])
    difference = (generator.logits(codes, condition) - generator.logits(changed, condition)).abs().amax(-1)[0]
    unit = generator.plan.revealed_at[position]
    later = torch.tensor([place > unit for place in generator.plan.revealed_at])
    assert (difference[~later] == 0).all()
    assert changed.equal(codes) or (difference[later] > 0).all()


GENERATORS = {shift: make("tiles", shift=shift) for shift in (False, True)}


def next_token(**changes: object) -> NextToken:
    return wake(NextToken(VOCAB, CLASSES, **{**SIZE, "grid": (3, 4), **changes}))


@pytest.mark.parametrize(
    "how",
    [{}, {"grid": None, "n_tokens": 12, "positions": "learned", "modulation": "block", "qk_norm": True}],
    ids=["2-D", "1-D"],
)
def test_block_1_with_shift_is_the_next_token_model(how: dict[str, object]) -> None:
    source = next_token(**how)
    converted = BlockDiffusion(VOCAB, CLASSES, **{**SIZE, "grid": (3, 4), **how}, block_size=1, shift=True, window=(1, 1))
    converted.load_state_dict(converted.weights_from(source))
    converted.eval()
    expected = source.token_nll(CODES, CONDITION)
    torch.testing.assert_close(converted.token_nll(CODES, CONDITION), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(converted.logits(CODES, CONDITION), source.logits(CODES, CONDITION), atol=1e-5, rtol=0)
    torch.testing.assert_close(converted.train().loss(CODES, CONDITION)["loss"], expected.mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_block_1_leaves_nothing_to_chance(shift: bool) -> None:
    """Its bound is the chain rule: each token from the clean ones before it."""
    generator = make("chunks", block_size=1, shift=shift)
    drawn = [generator.token_nll(CODES, CONDITION) for _ in range(2)]
    assert torch.equal(*drawn)
    chain = torch.nn.functional.cross_entropy(generator.logits(CODES, CONDITION).transpose(1, 2), CODES, reduction="none")
    torch.testing.assert_close(drawn[0], chain, atol=1e-5, rtol=0)


def test_a_converted_model_has_one_row_more_the_mean_one() -> None:
    source, converted = next_token(), make("rows", shift=True)
    converted.load_state_dict(converted.weights_from(source))
    torch.testing.assert_close(converted.tokens.weight[VOCAB], source.tokens.weight.mean(0))
    assert torch.equal(converted.tokens.weight[:VOCAB], source.tokens.weight)
    state = converted.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items() if name != "tokens.weight")
    torch.testing.assert_close(
        converted.logits(CODES, CONDITION)[:, 0], source.logits(CODES, CONDITION)[:, 0], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_both_estimators_of_the_bound_agree() -> None:
    """Weights k/m of a drawn count have the expectation of 1/t at a drawn level, up to its cut at 1e-3."""
    generator = make("chunks", block_size=4)
    codes, condition = CODES[:1].repeat(500, 1), CONDITION[:1].repeat(500)
    by_count = generator.token_nll(codes, condition).mean(1)
    generator.train()
    by_level = torch.stack([generator.loss(codes, condition)["loss"] for _ in range(8)])
    error = by_count.std() / 500**0.5 + by_level.std() / 8**0.5
    assert abs(by_count.mean() - by_level.mean()) < 5 * error
    assert error < 0.1


@torch.no_grad()
def test_the_bound_lies_above_the_likelihood() -> None:
    """Of two tokens in one block: the exact mixture over both orders."""
    generator = wake(BlockDiffusion(3, 1, n_tokens=2, block_size=2, dim=16, layers=1, heads=2, multiple_of=8))
    codes, condition = torch.tensor([[2, 0]]), torch.tensor([0])
    hidden = [torch.tensor([mask]) for mask in ([True, True], [True, False], [False, True])]
    both, first, second = (generator._denoise(codes, mask, condition)[0] for mask in hidden)
    exact = (both.sum() + first[0] + second[1]) / 2
    drawn = generator.token_nll(codes.repeat(20000, 1), condition.repeat(20000)).sum(1)
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 20000**0.5
    likelihood = -torch.log((torch.exp(-both[0] - second[1]) + torch.exp(-both[1] - first[0])) / 2)
    assert exact >= likelihood


def test_complementary_masks_predict_every_token_once() -> None:
    generator = make("chunks", weight="mean", complementary=True).train()
    noise = torch.rand(3, generator.noise_size)
    hidden = generator._blocks.by_level(generator._levels(noise), noise)
    loss = sum(generator._denoise(CODES, mask, CONDITION)[mask].sum() for mask in (hidden, ~hidden)) / CODES.numel()
    torch.testing.assert_close(generator.loss(CODES, CONDITION, noise)["loss"], loss)


@pytest.mark.parametrize("how", [{}, {"weight": "mean"}, {"level": "sample"}, {"weight": "mean", "complementary": True}])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(how: dict[str, object]) -> None:
    """Whatever the batch: a sample's draws are its own."""
    generator = make("chunks", **how).train()
    noise = sample_uniforms(0, torch.zeros(3, dtype=torch.long), torch.arange(3), 2, generator.noise_size)
    whole = generator.loss(CODES, CONDITION, noise)["loss"]
    parts = [generator.loss(CODES[i : i + 1], CONDITION[i : i + 1], noise[i : i + 1])["loss"] for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_levels() -> None:
    noise = torch.rand(400, make("chunks").noise_size)
    levels = make("chunks", window=(0.3, 0.8))._levels(noise)
    assert levels.min() >= 0.3
    assert levels.max() <= 0.8
    quarters = make("chunks")._levels(noise).sub(LEAST).div(1 - LEAST).mul(4).long().sort(dim=1).values
    assert torch.equal(quarters, torch.arange(4).repeat(400, 1))  # antithetic: one block of a sample in each quarter
    shared = make("chunks", level="sample")._levels(noise)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert make("chunks", window=(0, 1))._levels(noise).min() >= LEAST


def test_masks_hide_what_they_say() -> None:
    blocks = BlockMask([1, 4, 7])
    noise = torch.rand(20000, blocks.noise_size)
    hidden, weight = blocks.by_count(noise)
    counts = blocks.sums(hidden.float())
    assert counts.min() >= 1
    for block, size in enumerate([1, 4, 7]):
        shares = torch.bincount(counts[:, block].long(), minlength=size + 1)[1:] / 20000
        torch.testing.assert_close(shares, torch.full((size,), 1 / size), atol=0.02, rtol=0)
    torch.testing.assert_close(weight, (torch.tensor([1.0, 4, 7]) / counts)[:, blocks.of(noise.device)])
    assert (hidden.float().mean(0)[1:5] - 5 / 8).abs().max() < 0.02  # every token of a block alike
    levels = torch.tensor([[0.2, 0.5, 0.9]]).expand(20000, 3)
    share = blocks.by_level(levels, noise).float().mean(0)
    torch.testing.assert_close(share, levels[0, blocks.of(noise.device)], atol=0.02, rtol=0)


def test_the_calmest_window_is_chosen() -> None:
    levels = torch.linspace(LEAST, 1, 2000)
    nll = torch.where((levels > 0.3) & (levels < 0.8), 1.0, torch.randn(2000) * 5)
    chosen = calmest_window(window_moments(levels[None], nll[None]))
    assert chosen.tolist() == pytest.approx([0.3, 0.8])
    assert len(WINDOWS) == len(set(WINDOWS)) == 64
    assert calmest_window(torch.zeros(64, 3, dtype=torch.float64)).tolist() == pytest.approx([LEAST, 1])


def test_validation_moves_the_window_and_it_is_saved() -> None:
    generator = make("chunks", adapt_window=True)
    torch.manual_seed(0)
    generator.loss(CODES.repeat(50, 1), CONDITION.repeat(50))
    window = generator.window.clone()
    assert window.tolist() != pytest.approx([LEAST, 1])
    other = make("chunks", adapt_window=True)
    other.load_state_dict(generator.state_dict())
    assert torch.equal(other.window, window)
    generator.train().loss(CODES, CONDITION)
    assert generator._moments is None
    still = make("chunks")
    still.loss(CODES, CONDITION)
    assert still.window.tolist() == pytest.approx([LEAST, 1])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"grid": (3, 4), "block": "scales"}, "no scales"),
        ({"n_tokens": 12, "block": "rows"}, "no rows"),
        ({"n_tokens": 12, "block": "scales"}, "without scales"),
        ({}, "no tokens"),
        ({"grid": (3, 4), "block": "tiles", "block_size": 2}, "do not divide"),
        ({"grid": (3, 4), "block": "rows", "block_size": 2}, "do not divide"),
        ({"grid": (3, 4), "window": (0.8, 0.2)}, "is empty"),
        ({"grid": (3, 4), "complementary": True}, "set weight to mean"),
        ({"grid": (3, 4), "dim": 12, "heads": 2}, "rotary positions need"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], word: str) -> None:
    node = {"_target_": "tokar.models.generators.block_diffusion.BlockDiffusion", "vocab_size": 9, "num_classes": 2}
    with pytest.raises(UserError, match=word):
        build({**node, **SIZE, **arguments})


@pytest.mark.parametrize(
    ("name", "size"),
    [("block4_llamagen_b", 4), ("block_row_llamagen_b", 16), ("block_2rows_llamagen_b", 32), ("block_tile_llamagen_b", 16)]
    + [(f"block{size}_gigatok_b", size) for size in (4, 16, 32)],
)
def test_sizes_of_the_recipes(name: str, size: int) -> None:
    """Those of the next-token models that they begin from, and one row of the token table."""
    node = yaml.safe_load((ROOT / f"generator/{name}.yaml").read_text())
    tokens, millions = ({"n_tokens": 256}, 111.1) if "gigatok" in name else ({"grid": [16, 16]}, 110.9)
    with torch.device("meta"):
        generator = build({**node, "vocab_size": 16384, "num_classes": 1000, **tokens})
    assert sum(parameter.numel() for parameter in generator.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert {len(generator.plan.tokens(unit)) for unit in range(generator.plan.n_units)} == {size}
