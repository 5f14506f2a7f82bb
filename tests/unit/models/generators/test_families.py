"""What must hold of RAR, NAR and PAR alike."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.conf.compose import compose
from tokar.models.build import build
from tokar.models.generators import planned
from tokar.models.generators.base import Generator
from tokar.models.generators.diagonal import NAR
from tokar.models.generators.orders import raster
from tokar.models.generators.parallel import PAR
from tokar.models.generators.permuted import RAR
from tokar.models.generators.static_step import static_step
from tokar.models.samplers.decode import sample
from tokar.models.samplers.guidance import parse_schedule

VOCAB, CLASSES = 20, 5
PUBLISHED = {  # millions of parameters with the published codebook
    "rar_b": 260.9, "rar_l": 461.7, "rar_xl": 955.4, "rar_xxl": 1498.5,
    "nar_m": 295.5, "nar_l": 372.5, "nar_xl": 816.0, "nar_xxl": 1464.5,
    "par_xl_4x": 774.7, "par_xxl_4x": 1411.0, "par_3b_4x": 3096.7, "par_3b_16x": 3096.7,
}  # fmt: skip
STEPS = {"rar": 256, "nar": 31, "par": 147, "par_3b_16x": 51}
SIZES = {"dim": 32, "layers": 2, "heads": 2}
MAKE = {
    "rar": lambda: RAR(VOCAB, CLASSES, grid=(3, 4), spare_positions=3, **SIZES),
    "rar 1-D": lambda: RAR(VOCAB, CLASSES, n_tokens=7, **SIZES),
    "nar": lambda: NAR(VOCAB, CLASSES, (3, 4), multiple_of=16, **SIZES),
    "par": lambda: PAR(VOCAB, CLASSES, (4, 6), (2, 2), multiple_of=16, **SIZES),
}


def make(family: str) -> Generator:
    torch.manual_seed(0)
    generator = MAKE[family]()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


families = pytest.mark.parametrize("family", MAKE)


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed shapes"])
@families
@torch.no_grad()
def test_steps_with_a_cache_give_the_full_pass(family: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "compiled_step", lambda: static_step)
    generator, condition = make(family), torch.tensor([0, CLASSES, 2])
    codes = torch.randint(VOCAB, (3, generator.plan.n_tokens))
    full, state = generator.logits(codes, condition), generator.begin(condition, compile=fixed)
    for unit in range(generator.plan.n_units):
        columns, stepped = generator.plan.columns(unit), generator.propose(state, unit)
        torch.testing.assert_close(stepped, full[:, columns], atol=1e-5, rtol=0)
        torch.testing.assert_close(generator.recompute(codes, condition, unit), stepped, atol=1e-5, rtol=0)
        generator.commit(state, unit, codes[:, columns])


@families
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_no_leak(family: str, data: st.DataObject) -> None:
    """A changed code moves no logit of its own unit nor of an earlier one, and moves every later one."""
    generator, condition = make(family), torch.tensor([2])
    plan = generator.plan
    codes = torch.randint(VOCAB, (1, plan.n_tokens), generator=torch.Generator().manual_seed(1))
    token = data.draw(st.integers(0, plan.n_tokens - 1))
    changed = codes.clone()
    changed[0, token] = (codes[0, token] + 1) % VOCAB
    moved = (generator.logits(codes, condition) - generator.logits(changed, condition)).abs().amax(dim=(0, 2))
    later = torch.tensor([plan.revealed_at[other] > plan.revealed_at[token] for other in range(plan.n_tokens)])
    assert (moved[~later] < 1e-6).all()
    assert (moved[later] > 1e-6).all()


@families
@torch.no_grad()
def test_rows_that_join_late_are_as_if_there_from_the_start(family: str) -> None:
    generator = make(family)
    codes = torch.randint(VOCAB, (2, generator.plan.n_tokens))
    for late in (0, 1, generator.plan.n_units - 1):
        state = generator.begin(torch.tensor([1]), capacity=2)
        for unit in range(late):
            generator.propose(state, unit)
            generator.commit(state, unit, codes[:1, generator.plan.columns(unit)])
        generator.join(state, torch.tensor([4]), codes[1:], late)
        expected = generator.recompute(codes, torch.tensor([1, 4]), late)
        torch.testing.assert_close(generator.propose(state, late), expected, atol=1e-5, rtol=0)


@families
@pytest.mark.parametrize(
    "guidance", [2.0, "power_cosine:4,power=2.75", {"kind": "interval", "value": 3, "start": 0.3, "stop": 0.6}]
)
def test_sampling_with_a_cache_is_sampling_without(family: str, guidance: object) -> None:
    generator, condition = make(family), torch.arange(4)
    cached, plain = (
        sample(generator, condition, seed=3, guidance=guidance, temperature=1.02, cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@families
def test_every_parameter_learns(family: str) -> None:
    generator = make(family)
    sample(generator, torch.tensor([0]), seed=0)
    generator.train()
    generator(torch.randint(VOCAB, (2, generator.plan.n_tokens)), torch.tensor([0, 1]))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())


@families
def test_state_holds_parameters_only(family: str) -> None:
    generator = make(family)
    assert set(generator.state_dict()) == {name for name, _ in generator.named_parameters()}


@pytest.mark.parametrize("family", [NAR, PAR])
def test_tokens_without_a_grid_are_refused(family: type[Generator]) -> None:
    with pytest.raises(ValueError, match="the tokens form no grid; choose a next-token generator"):
        family(VOCAB, CLASSES, **SIZES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_build_the_published_networks(name: str) -> None:
    config = compose("generator", [f"experiment={name}"]).typed
    side = config.data.image_size // 16
    sizes = {"vocab_size": 1024 if name.startswith("rar") else 16384, "num_classes": 1000, "grid": [side, side]}
    with torch.device("meta"):
        generator = build({**config.generator, **sizes})
    assert sum(parameter.numel() for parameter in generator.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.05)
    assert generator.plan.n_units == STEPS.get(name, STEPS[name[:3]])


def test_guidance_of_rar_follows_its_power_cosine() -> None:
    """1 + (S - 1)·(1 - cos(π·(i/N)^p))/2 at step i (its sampler; S 16, p 2.75)."""
    guidance = compose("generator", ["experiment=rar_b"]).typed.sampling.guidance
    scales = parse_schedule(guidance).over(raster((16, 16), 2))
    for step in (0, 100, 255):
        assert scales[step] == pytest.approx(1 + 15 * (1 - math.cos(math.pi * (step / 256) ** 2.75)) / 2)
