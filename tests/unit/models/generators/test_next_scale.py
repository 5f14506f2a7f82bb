"""VAR: cached steps, no leak, an independent second implementation, published sizes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.generators import planned
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.orders import scales
from tokar.models.generators.plan import visible
from tokar.models.generators.static_step import static_step
from tokar.models.samplers.decode import sample
from tokar.train.pieces import whole_pieces
from torch import Tensor

VOCAB, CLASSES, GRIDS, TOKENS = 16, 5, ((1, 1), (2, 2), (4, 4)), 21
TOKENIZER = tiny("multiscale")
VARIANTS = [
    {},
    {"shared_modulation": True},
    {"qk_l2": False},
    {"shared_modulation": True, "qk_l2": False, "heads": 4},
]
SCHEDULES = [
    1.0,
    2.5,
    "linear:4",
    "ramp:2.5",
    "cosine:3",
    {"kind": "power_cosine", "value": 3.0, "power": 2.0},
    {"kind": "step", "value": 3.0, "start": 0.2},
    {"kind": "interval", "value": 3.0, "start": 0.04, "stop": 0.2},
    {"kind": "interval", "value": 3.0, "stop": 0.2},
]


def make(kind: type[NextScale] = NextScale, **changes: object) -> NextScale:
    torch.manual_seed(0)
    arguments = {"embed_dim": 4, "dim": 32, "layers": 2, "heads": 2, "gate_init": 1.0, **changes}
    generator = kind(VOCAB, CLASSES, GRIDS, **arguments)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator.bind(TOKENIZER)
    return generator.eval()


GENERATOR = make()


def codes_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def reference(generator: NextScale, codes: Tensor, label: int) -> Tensor:
    """Logits `[N, V]` of one image by VAR's formulas: one query at a time, f̂ by loops, the weights read by name."""
    state = generator.state_dict()
    config, quantizer = generator.transformer.config, TOKENIZER.quantizer
    heads, width = config.heads, config.head_dim
    condition = state["classes.weight"][label]
    f_hat, rows = torch.zeros(1, 4, 4, 4), []
    start = 0
    for k, (side, _) in enumerate(GRIDS):
        if k == 0:
            inputs = (condition + state["start"])[:1]
        else:
            pooled = f_hat.unfold(2, 4 // side, 4 // side).unfold(3, 4 // side, 4 // side).mean((-2, -1))
            inputs = pooled[0].flatten(1).T @ state["embed.weight"].T + state["embed.bias"]
        count = side * side
        rows.append(inputs + state["positions"][start : start + count] + state["levels.weight"][k])
        grid = quantizer.codebook[codes[start : start + count]].T.reshape(1, 4, side, side)
        grown = F.interpolate(grid, (4, 4), mode="bicubic")
        phi = quantizer.shared_phis[quantizer.phi_index[k]]
        f_hat = f_hat + 0.5 * grown + 0.5 * phi(grown)
        start += count
    x, unit = torch.cat(rows), [k for k, (side, _) in enumerate(GRIDS) for _ in range(side * side)]
    active = condition * condition.sigmoid()

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    for layer in range(config.layers):
        name = f"transformer.blocks.{layer}."
        if config.modulation == "shared":
            six = state["transformer.shared.weight"] @ active + state["transformer.shared.bias"]
            six = six.view(6, -1) + state[name + "offset"]
        else:
            six = (state[name + "modulation.weight"] @ active + state[name + "modulation.bias"]).view(6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = six
        h = normed(x) * (1 + scale1) + shift1
        query, key, value = (h @ state[name + "attention.qkv.weight"].T).chunk(3, dim=-1)
        query, value = query + state[name + "attention.qv_bias"][0], value + state[name + "attention.qv_bias"][1]
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q, k, factor = query[:, part], key[:, part], 0.25 / math.sqrt(width)
            if config.qk_norm == "l2":
                q = q / q.norm(dim=-1, keepdim=True)
                k = k / k.norm(dim=-1, keepdim=True)
                factor = math.exp(min(float(state[name + "attention.temperature"][head]), math.log(100)))
            for slot in range(TOKENS):
                seen = [other for other in range(TOKENS) if unit[other] <= unit[slot]]
                mixed[slot, part] = ((k[seen] @ q[slot]) * factor).softmax(0) @ value[seen, part]
        x = x + gate1 * (mixed @ state[name + "attention.out.weight"].T + state[name + "attention.out.bias"])
        h = normed(x) * (1 + scale2) + shift2
        h = h @ state[name + "mlp.up.weight"].T + state[name + "mlp.up.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * (h @ state[name + "mlp.down.weight"].T + state[name + "mlp.down.bias"])
    scale, shift = (state["transformer.final.weight"] @ active + state["transformer.final.bias"]).chunk(2)
    return (normed(x) * (1 + scale) + shift) @ state["head.weight"].T + state["head.bias"]


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_against_a_plain_second_implementation(changes: dict[str, object]) -> None:
    generator, codes = make(**changes), codes_of(1)
    for label in (3, generator.null_class):
        expected = reference(generator, codes[0], label)
        torch.testing.assert_close(generator.logits(codes, torch.tensor([label]))[0], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_temperature_is_bounded() -> None:
    generator = make()
    for name, parameter in generator.named_parameters():
        if name.endswith("temperature"):
            parameter.fill_(7.0)  # ln 100 is 4.6
    expected = reference(generator, codes_of(1)[0], 1)
    torch.testing.assert_close(generator.logits(codes_of(1), torch.tensor([1]))[0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed shapes"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_steps_with_a_cache_give_the_full_pass(
    changes: dict[str, object], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "compiled_step", lambda: static_step)
    generator, codes, condition = make(**changes), codes_of(3), torch.tensor([0, 5, 2])
    full = generator.logits(codes, condition)
    state = generator.begin(condition, compile=fixed)
    for unit in range(len(GRIDS)):
        columns = generator.plan.columns(unit)
        stepped = generator.propose(state, unit)
        torch.testing.assert_close(stepped, full[:, columns], atol=1e-5, rtol=0)
        torch.testing.assert_close(generator.recompute(codes, condition, unit), stepped, atol=1e-5, rtol=0)
        assert torch.equal(generator.propose(state, unit), stepped)
        generator.commit(state, unit, codes[:, columns])


@pytest.mark.parametrize("guidance", SCHEDULES, ids=str)
def test_cached_sampling_equals_uncached(guidance: object) -> None:
    condition = torch.arange(6) % CLASSES
    choices = {"seed": 1, "guidance": guidance, "temperature": 0.9, "top_k": 12, "top_p": 0.95}
    cached = sample(GENERATOR, condition, **choices)
    assert torch.equal(cached, sample(GENERATOR, condition, cache=False, **choices))
    assert torch.equal(cached[1:3], sample(GENERATOR, condition[1:3], sample_ids=torch.tensor([1, 2]), **choices))


def test_rows_that_join_late_are_as_if_there_from_the_start() -> None:
    codes = codes_of(2)
    for late in range(3):
        state = GENERATOR.begin(torch.tensor([1]), capacity=2)
        for unit in range(late):
            GENERATOR.propose(state, unit)
            GENERATOR.commit(state, unit, codes[:1, GENERATOR.plan.columns(unit)])
        GENERATOR.join(state, torch.tensor([4]), codes[1:], late)
        expected = GENERATOR.recompute(codes, torch.tensor([1, 4]), late)
        torch.testing.assert_close(GENERATOR.propose(state, late), expected, atol=1e-5, rtol=0)
        GENERATOR.keep(state, 1)
        torch.testing.assert_close(GENERATOR.propose(state, late), expected[:1], atol=1e-5, rtol=0)


class Counting(NextScale):
    """Counts the rows of every pass through the transformer."""

    def _pass(self, x: Tensor, *others: object, **more: object) -> Tensor:
        self.rows = [*getattr(self, "rows", []), (len(x), x.shape[1])]
        return super()._pass(x, *others, **more)


@pytest.mark.parametrize(
    ("guidance", "passes"),
    [
        (1.0, [(2, 1), (2, 4), (2, 16)]),
        (2.0, [(4, 1), (4, 4), (4, 16)]),
        ("ramp:2.5", [(2, 1), (2, 1), (4, 4), (4, 16)]),  # off at the first scale; the second pass brings it up to date
        ({"kind": "interval", "value": 3.0, "stop": 0.2}, [(4, 1), (4, 4), (2, 16)]),
    ],
    ids=str,
)
def test_the_unconditional_half_is_computed_only_where_wanted(guidance: object, passes: list[tuple[int, int]]) -> None:
    generator = make(Counting)
    sample(generator, torch.tensor([0, 1]), seed=0, guidance=guidance)
    assert generator.rows == passes


@settings(max_examples=40, deadline=None)
@given(token=st.integers(0, TOKENS - 1), value=st.integers(0, VOCAB - 1), seed=st.integers(0, 1000))
def test_no_leak(token: int, value: int, seed: int) -> None:
    """A changed code moves no logit of its own or an earlier scale."""
    codes = codes_of(1, seed)
    changed = codes.clone()
    changed[0, token] = value
    with torch.no_grad():
        before, after = (GENERATOR.logits(rows, torch.tensor([2])) for rows in (codes, changed))
    end = GENERATOR.plan.committed[GENERATOR.plan.revealed_at[token] + 1]
    assert torch.equal(before[:, :end], after[:, :end])
    if value != codes[0, token] and end < TOKENS:
        assert (before[:, end:] != after[:, end:]).any(dim=-1).all()


def test_every_parameter_learns() -> None:
    generator = make().train()
    sample(generator, torch.tensor([0]), seed=0)
    generator(codes_of(2), torch.tensor([0, 5]))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())
    assert all(parameter.grad is None for parameter in TOKENIZER.parameters())


def test_a_fresh_model_is_close_to_uniform() -> None:
    torch.manual_seed(0)
    generator = NextScale(VOCAB, CLASSES, GRIDS, embed_dim=4, dim=64, layers=2, heads=2)
    generator.bind(TOKENIZER)
    loss = generator(codes_of(4), torch.tensor([0, 1, 2, 3]))["loss"].item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.02)
    std = math.sqrt(1 / (3 * 64))
    assert generator.classes.weight.std().item() == pytest.approx(std, rel=0.1)
    gates, rest = generator.transformer.blocks[0].modulation.weight.split([128, 256])
    assert gates.std().item() == pytest.approx(1e-3 * std, rel=0.1)
    assert rest.std().item() == pytest.approx(0.5 * std, rel=0.1)


def test_label_smoothing_only_while_training() -> None:
    plain, smooth = make(), make(label_smoothing=0.3)
    codes, condition = codes_of(2), torch.tensor([0, 1])
    assert torch.equal(plain(codes, condition)["loss"], smooth(codes, condition)["loss"])
    assert not torch.equal(plain.train()(codes, condition)["loss"], smooth.train()(codes, condition)["loss"])


@pytest.mark.parametrize(
    ("option", "millions"),
    [("var_d12", 133.2), ("var_d16", 310.3), ("var_d20", 600.9), ("var_d24", 1033.4), ("var_d30", 2010.0)],
)
def test_published_sizes(option: str, millions: float) -> None:
    assert count_millions(option, 256) == pytest.approx(millions, abs=0.05)


def test_published_sizes_of_d36() -> None:
    assert count_millions("var_d36", 512) == pytest.approx(2353.9, abs=0.05)
    assert count_millions("var_d36", 256, shared_modulation=False) == pytest.approx(3465, abs=1)


def count_millions(option: str, pixels: int, **changes: object) -> float:
    """Parameters of an option of the group generator with 4096 codes of width 32 and 1000 classes, in millions."""
    sides = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}[pixels]
    overrides = [f"generator={option}", "loop.duration=1", "codes.tokenizer=runs/some"]
    node = compose("generator", overrides).plain["generator"]
    known = {"vocab_size": 4096, "num_classes": 1000, "embed_dim": 32, "grids": [(side, side) for side in sides]}
    with torch.device("meta"):
        generator = build({**node, **known, **changes})
    return sum(parameter.numel() for parameter in generator.parameters()) / 1e6


def test_a_copy_shares_the_tokenizer_and_holds_none_of_it() -> None:
    names = {name for name, _ in GENERATOR.named_parameters()}
    assert set(GENERATOR.state_dict()) == names
    twin = copy.deepcopy(GENERATOR)
    assert twin.tokenizer is TOKENIZER
    assert twin.head.weight is not GENERATOR.head.weight
    assert torch.equal(twin.logits(codes_of(1), torch.tensor([0])), GENERATOR.logits(codes_of(1), torch.tensor([0])))
    assert {piece.name for piece in whole_pieces(GENERATOR)} == names


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    fresh = NextScale(VOCAB, CLASSES, GRIDS, embed_dim=4, dim=32, layers=1, heads=2)
    with pytest.raises(UserError, match="reconstructs as it goes"):
        fresh.logits(codes_of(1), torch.tensor([0]))
    with pytest.raises(UserError, match="needs a multi-scale tokenizer, this one is a VQGAN"):
        fresh.bind(tiny("vqgan"))
    with pytest.raises(UserError, match="the tokenizer's are"):
        fresh.bind(tiny("flexvar"))
    with pytest.raises(ValueError, match="3 heads do not divide the width 32"):
        make(heads=3)


def test_bands_are_scales() -> None:
    """NFIG's frequency bands are units of one grid each, coarse first, perhaps several of one size: the same plan."""
    bands = ((1, 1), (2, 2), (2, 2), (3, 2))
    plan = scales(bands)
    unit = [band for band, (rows, columns) in enumerate(bands) for _ in range(rows * columns)]
    assert visible(plan).tolist() == [[unit[key] <= unit[query] for key in range(15)] for query in range(15)]
    assert [plan.columns(band) for band in range(4)] == [slice(0, 1), slice(1, 5), slice(5, 9), slice(9, 15)]
