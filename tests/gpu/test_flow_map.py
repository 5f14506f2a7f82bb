"""The fused token map on a GPU against the eager one."""

import pytest
import torch
from tokar.models.distill.flow_map import TokenMap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("top_k", [0, 50], ids=["all", "gathered"])
def test_the_fused_map_takes_the_same_codes(top_k):
    generator = torch.Generator().manual_seed(0)
    codes, logits = torch.randn(512, 8, generator=generator), 3 * torch.randn(300, 512, generator=generator)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    noise = torch.randn(300, 8, generator=generator)
    expected = TokenMap(codes)(noise, logits)
    torch.set_float32_matmul_precision("high")  # TF32 must not reach the map
    try:
        for fused in (False, True):
            found = TokenMap(codes.cuda(), fused=fused)(noise.cuda(), logits.cuda()).cpu()
            assert (found == expected).float().mean() > 0.99
    finally:
        torch.set_float32_matmul_precision("highest")
