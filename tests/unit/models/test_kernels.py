"""Attention's back ends: the same numbers, chosen with a reason, refused where they cannot work."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.errors import UserError
from tokar.models import kernels
from tokar.models.attention import Context, attend
from tokar.models.generators.base import Generator
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.generators.orders import blocks, cells, diagonals, parallel, raster, scales, tiles
from tokar.models.generators.plan import Plan, block_mask, visible

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GRID = (4, 4)
PLANS = {
    "causal": raster(GRID),
    "scales": scales([(1, 1), (2, 2), (4, 4)]),
    "diagonals": diagonals(GRID),
    "parallel": parallel(GRID, (2, 2)),
    "two streams": blocks(cells(GRID), tiles(GRID, (2, 2)), GRID),
}


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_flex_by_block_masks_is_sdpa_by_dense_ones(plan: Plan) -> None:
    torch.manual_seed(0)
    slots = plan.n_slots
    query, key, value = torch.randn(3, 2, 2, slots, 8)
    mask, made = visible(plan), block_mask(plan, slots, CPU)
    assert block_mask(plan, slots, CPU) is made
    for scale in (None, 1.0):
        expected = attend(query, key, value, Context(mask=mask), scale)
        found = attend(query, key, value, Context(mask=mask, kernel="flex", blocks=made), scale)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    unmasked = attend(query, key, value, Context())
    assert not torch.allclose(found, unmasked, atol=1e-3)


def next_token() -> NextToken:
    return NextToken(16, 5, grid=GRID, dim=32, layers=2, heads=2, multiple_of=16)


def next_scale() -> NextScale:
    generator = NextScale(16, 5, [(1, 1), (2, 2), (4, 4)], embed_dim=4, dim=32, layers=2, heads=2)
    generator.bind(tiny("multiscale"))
    return generator


@torch.no_grad()
def test_both_streams_of_block_diffusion_are_the_same_under_flex() -> None:
    torch.manual_seed(0)
    generator = BlockDiffusion(16, 5, n_tokens=8, block_size=4, dim=32, layers=2, heads=2, multiple_of=16).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codes, condition, noise = torch.randint(16, (2, 8)), torch.tensor([0, 5]), torch.rand(2, generator.noise_size)
    expected = generator.token_nll(codes, condition, noise)
    generator.attention = "flex"
    torch.testing.assert_close(generator.token_nll(codes, condition, noise), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [next_token, next_scale])
def test_a_generator_gives_the_same_logits_under_flex(make: type[Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    generator = make().eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codes, condition = torch.randint(16, (2, generator.plan.n_tokens)), torch.tensor([0, 5])
    expected = generator.logits(codes, condition)
    part = generator.recompute(codes, condition, 2)
    calls: list[int] = []
    flex = kernels.flex

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return flex(*arguments)

    monkeypatch.setattr("tokar.models.attention.flex", counted)
    generator.attention = "flex"
    torch.testing.assert_close(generator.logits(codes, condition), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(generator.recompute(codes, condition, 2), part, atol=1e-5, rtol=0)
    assert len(calls) == 4  # two layers, two passes


@pytest.mark.parametrize(
    ("wanted", "device", "half", "causal", "kernel", "why"),
    [
        ("auto", CPU, False, True, "sdpa", "not flash: it needs a GPU"),
        ("auto", GPU, False, True, "sdpa", "not flash: it needs strategy.precision bf16 or fp16"),
        ("auto", GPU, True, False, "sdpa", "not flash: it knows no mask but the causal one"),
        ("auto", GPU, True, True, "flash", "flash-attn 2 is installed, the mask is causal"),
        ("flash", GPU, True, True, "flash", "as asked"),
        ("flex", GPU, False, False, "flex", "as asked; block masks from the plan"),
        ("sdpa", CPU, False, False, "sdpa", "as asked"),
    ],
)
def test_the_choice_and_its_reason(
    wanted: str, device: torch.device, half: bool, causal: bool, kernel: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_flash", lambda: ("flash-attn 2", attend))
    assert kernels.choose(wanted, device, half, causal) == (kernel, why)


@pytest.mark.parametrize(
    ("wanted", "device", "half", "causal", "message"),
    [
        ("flex", CPU, False, True, "flex cannot train on a CPU; set strategy.attention=auto"),
        ("flash", CPU, True, True, "flash cannot be used: it needs a GPU"),
        ("flash", GPU, True, True, "flash-attn cannot be imported"),
        ("flash", GPU, True, False, "no mask but the causal one"),
    ],
)
def test_what_cannot_work_is_refused(
    wanted: str, device: torch.device, half: bool, causal: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_flash", lambda: None)
    with pytest.raises(UserError, match=message):
        kernels.choose(wanted, device, half, causal)


def test_flash_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """`[B, L, H, D]`, one type for all; some versions return the log-sum-exp besides."""
    query, key, value = torch.randn(3, 2, 4, 5, 8)

    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> object:
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert query.shape == (2, 5, 4, 8)
        parts = [part.float().transpose(1, 2) for part in (query, key, value)]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=options["causal"], scale=options["softmax_scale"]
        )
        return mixed.transpose(1, 2), None

    monkeypatch.setattr(kernels, "_flash", lambda: ("flash-attn 4", stand_in))
    found = kernels.flash(query, key, value.bfloat16(), True, None)
    parts = [part.bfloat16().float() for part in (query, key, value)]
    torch.testing.assert_close(found, kernels.sdpa(*parts, None, True, None, 0.0))
