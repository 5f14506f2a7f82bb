"""The fused back ends against sdpa, forward and backward, where there is a GPU."""

import pytest
import torch
from tokar.models.attention import Context, attend
from tokar.models.generators.orders import blocks, cells, diagonals, raster, scales, tiles
from tokar.models.generators.plan import Plan, block_mask, visible
from tokar.models.kernels import choose, flash_name

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
PLANS = {
    "causal": raster((16, 16)),
    "scales": scales([(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]),
    "diagonals": diagonals((16, 16)),
    "two streams": blocks(cells((16, 16)), tiles((16, 16), (4, 4)), (16, 16)),
}


def tensors(slots: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, slots, 64, device=GPU, dtype=dtype, requires_grad=True) for _ in range(3)]


def both(context: Context, slots: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The result and the gradients."""
    inputs = tensors(slots, dtype)
    mixed = attend(*inputs, context)
    mixed.float().square().sum().backward()
    return [mixed, *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
def test_flex(plan: Plan, dtype: torch.dtype, tolerance: float) -> None:
    mask, slots = visible(plan).to(GPU), plan.n_slots
    expected = both(Context(mask=mask), slots, dtype)
    found = both(Context(mask=mask, kernel="flex", blocks=block_mask(plan, slots, GPU)), slots, dtype)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(flash_name() == "none", reason="flash-attn cannot be imported")
@pytest.mark.parametrize("causal", [True, False])
def test_flash(causal: bool) -> None:
    expected = both(Context(causal=causal), 256, torch.bfloat16)
    found = both(Context(causal=causal, kernel="flash"), 256, torch.bfloat16)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)
    assert choose("auto", GPU, half=True, causal=True)[0] == "flash"
