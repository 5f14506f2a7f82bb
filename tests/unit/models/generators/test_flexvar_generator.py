"""FlexVAR: any list of scales over one set of weights, training on sets of them."""

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import tiny
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.generators.flexvar import FlexVAR
from tokar.models.samplers.decode import sample
from torch import Tensor

VOCAB, CLASSES = 16, 5
SIDES = (1, 2, 3, 4)
GRIDS = tuple((side, side) for side in SIDES)
TOKENS = sum(side * side for side in SIDES)
TOKENIZER = tiny("flexvar").over(SIDES)


def make(**changes: object) -> FlexVAR:
    torch.manual_seed(0)
    sizes = {"embed_dim": 4, "dim": 32, "layers": 2, "heads": 2, "map_size": 8, "groups": [[2, 3, 1]], "standard_share": 0.0}
    generator = FlexVAR(VOCAB, CLASSES, **{"grids": GRIDS, **sizes, **changes})
    for name, parameter in generator.named_parameters():
        if name != "place_map":
            torch.nn.init.normal_(parameter, std=0.2)
    generator.bind(TOKENIZER)
    return generator.eval()


GENERATOR = make()


def codes_of(rows: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_inputs_are_the_scale_before_enlarged_and_places_the_resized_map() -> None:
    codes = codes_of(1)
    x = GENERATOR._fill(codes, torch.tensor([3]), slice(0, TOKENS), None)[0]
    first = 0
    for k, side in enumerate(SIDES):
        places = F.adaptive_avg_pool2d(GENERATOR.place_map, side).flatten(1).T
        if k == 0:
            inputs = GENERATOR.classes.weight[3] + GENERATOR.start
        else:
            before = codes[0, first - SIDES[k - 1] ** 2 : first]
            vectors = F.normalize(TOKENIZER.quantizer.codebook, dim=-1)[before].T.reshape(1, 4, SIDES[k - 1], SIDES[k - 1])
            inputs = GENERATOR.embed(F.interpolate(vectors, (side, side), mode="bicubic")[0].flatten(1).T)
        torch.testing.assert_close(x[first : first + side * side], inputs + places, atol=1e-5, rtol=0)
        first += side * side


@pytest.mark.parametrize("sides", [SIDES, (1, 4), (1, 2, 2, 3, 6)], ids=str)
def test_steps_with_a_cache_give_the_full_pass(sides: tuple[int, ...]) -> None:
    generator = GENERATOR.over([(side, side) for side in sides])
    codes, condition = codes_of(3, generator.plan.n_tokens), torch.tensor([0, 5, 2])
    full, state = generator.logits(codes, condition), generator.begin(condition)
    for unit in range(len(sides)):
        columns = generator.plan.columns(unit)
        torch.testing.assert_close(generator.propose(state, unit), full[:, columns], atol=1e-5, rtol=0)
        generator.commit(state, unit, codes[:, columns])
    choices = {"seed": 0, "guidance": "ramp:3.5"}
    assert torch.equal(sample(generator, condition, **choices), sample(generator, condition, cache=False, **choices))


def test_a_view_shares_its_weights_and_leaves_the_original_alone() -> None:
    view = GENERATOR.over([(1, 1), (6, 6)])
    assert view.place_map is GENERATOR.place_map
    assert (view.plan.n_tokens, GENERATOR.plan.n_tokens) == (37, TOKENS)
    assert GENERATOR.tokenizer is TOKENIZER
    assert view.tokenizer.layout.image_size == (48, 48)
    assert view.tokenizer.decode(sample(view, torch.tensor([1]), seed=0).clone()).shape == (1, 3, 48, 48)
    assert TOKENIZER.layout.image_size == (32, 32)


def test_a_scale_left_out_changes_what_follows_it_only() -> None:
    whole, codes = GENERATOR.logits(codes_of(1), torch.tensor([1])), codes_of(1)
    view = GENERATOR.over([GRIDS[0], GRIDS[1], GRIDS[3]])
    kept = torch.cat((codes[:, :5], codes[:, 14:]), dim=1)
    part = view.logits(kept, torch.tensor([1]))
    torch.testing.assert_close(part[:, :5], whole[:, :5])
    assert (part[:, 5:] != whole[:, 14:]).any(dim=-1).all()


def test_training_draws_sets_that_follow_the_seed() -> None:
    generator, codes, condition = make().train(), codes_of(2), torch.tensor([0, 1])

    def losses() -> list[float]:
        torch.manual_seed(3)
        return [generator(codes, condition)["loss"].item() for _ in range(8)]

    first = losses()
    assert losses() == first
    assert len(set(first)) == 2  # without the scale of two rows, or of three
    torch.manual_seed(3)
    kept = generator.draw()
    assert kept in ([0, 1, 3], [0, 2, 3])
    columns = [column for scale in kept for column in generator.plan.tokens(scale)]
    view = generator.over([GRIDS[scale] for scale in kept])
    logits = view.logits(codes[:, columns], condition)
    assert first[0] == F.cross_entropy(logits.flatten(0, 1), codes[:, columns].flatten()).item()
    assert generator.eval()(codes, condition)["loss"].item() not in first


def test_every_parameter_learns() -> None:
    generator = make().train()
    generator(codes_of(2), torch.tensor([0, 5]))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())


def test_published_sets() -> None:
    """1, 2, five of 3 … 10, two of 11 … 15, 16, within 680 tokens; 5 % are the standard set."""
    with torch.device("meta"):
        generator = FlexVAR(16, 5, [(side, side) for side in range(1, 17)], embed_dim=4, dim=32, layers=1, heads=2)
    torch.manual_seed(0)
    sets = [tuple(scale + 1 for scale in generator.draw()) for _ in range(600)]
    standard = sets.count((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert 15 <= standard <= 50
    for drawn in sets:
        assert (drawn[0], drawn[-1]) == (1, 16)
        assert sum(side * side for side in drawn) <= 680
    full = [drawn for drawn in sets if len(drawn) == 10]
    assert any(sum(3 <= side <= 10 for side in drawn) == 5 and sum(11 <= side <= 15 for side in drawn) == 2 for drawn in full)
    assert len(set(sets)) > 100


@pytest.mark.parametrize(("option", "millions"), [("flexvar_d16", 310.6), ("flexvar_d20", 601.3), ("flexvar_d24", 1033.9)])
def test_sizes(option: str, millions: float) -> None:
    """Published as 310, 600 and 1.0 B."""
    overrides = [f"generator={option}", "loop.duration=1", "codes.tokenizer=runs/some"]
    node = compose("generator", overrides).plain["generator"]
    grids = [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    with torch.device("meta"):
        generator = build({**node, "vocab_size": 4096, "num_classes": 1000, "embed_dim": 32, "grids": grids})
    assert sum(parameter.numel() for parameter in generator.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match=r"no residuals, those of a MultiScaleVQ are"):
        make().bind(tiny("multiscale"))
    with pytest.raises(UserError, match=r"begin with \(1, 1\), as in training"):
        GENERATOR.over([(2, 2), (4, 4)])
    with pytest.raises(ValueError, match="max_tokens 16 are fewer than the 17"):
        make(max_tokens=16)
    with pytest.raises(ValueError, match="do not end with the finest"):
        GENERATOR.over([(1, 1), (4, 4), (3, 3)])
