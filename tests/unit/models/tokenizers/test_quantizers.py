import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.quantizers import VectorQuantizer, entropy_loss, nearest_code


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain_nearest(rows, codes):
    return (rows[:, None] - codes[None]).square().sum(-1).argmin(-1)


@pytest.mark.parametrize("chunk", [None, 1, 7, 50])
@pytest.mark.parametrize("unit", [True, False])
def test_chunked_search_equals_the_plain_one(chunk, unit):
    rows, codes = torch.randn(50, 8), torch.randn(33, 8)
    if unit:
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    assert torch.equal(nearest_code(rows, codes, chunk), plain_nearest(rows, codes))


def test_search_ignores_and_restores_the_precision_switch():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        nearest_code(torch.randn(4, 2), torch.randn(3, 2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 6)])
@pytest.mark.parametrize("unit", [True, False])
def test_shapes_and_values(shape, unit):
    quantizer = VectorQuantizer(16, 4, l2_normalize=unit)
    latent, indices, losses = quantizer(torch.randn(shape))
    assert latent.shape == shape
    assert indices.shape == (shape[0], *shape[2:])
    assert indices.dtype == torch.int64
    assert set(losses) == {"codebook", "commitment"}
    assert torch.equal(quantizer.embed(indices), latent), "the codes alone give back the very same latent"
    assert torch.equal(quantizer.embed(indices).movedim(1, -1), quantizer.codes()[indices])
    if unit:
        torch.testing.assert_close(latent.norm(dim=1), torch.ones(indices.shape))


def test_codebook_starts_small_or_on_the_unit_sphere():
    plain = VectorQuantizer(50, 4, l2_normalize=False).codebook
    assert 0.5 / 50 < plain.abs().max() <= 1 / 50
    torch.testing.assert_close(VectorQuantizer(50, 4).codebook.norm(dim=-1), torch.ones(50))


def test_losses_are_the_formulas():
    quantizer, z = VectorQuantizer(16, 4, beta=0.3), torch.randn(2, 4, 3)
    latent, _, losses = quantizer(z)
    distance = (latent - F.normalize(z, dim=1)).square().mean()
    torch.testing.assert_close(losses["codebook"], distance)
    torch.testing.assert_close(losses["commitment"], 0.3 * distance)


def test_straight_through_gradient_is_the_identity():
    z, upstream = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    quantizer = VectorQuantizer(16, 4, l2_normalize=False)
    (quantizer(z).latent * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)
    assert quantizer.codebook.grad is None


def test_straight_through_gradient_passes_the_normalisation():
    z, upstream = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    (VectorQuantizer(16, 4)(z).latent * upstream).sum().backward()
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * upstream).sum(), z)
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize(("loss", "moves_codebook"), [("codebook", True), ("commitment", False)])
def test_each_loss_moves_one_side(loss, moves_codebook):
    quantizer, z = VectorQuantizer(16, 4), torch.randn(2, 4, 3, requires_grad=True)
    quantizer(z).losses[loss].backward()
    assert (quantizer.codebook.grad is not None) == moves_codebook
    assert (z.grad is not None) != moves_codebook


def test_entropy_loss_is_the_formula_whatever_the_chunk():
    rows, codes = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    p = F.softmax(-(rows[:, None] - codes[None]).square().sum(-1) / 0.01, dim=-1)
    mean = p.mean(0)
    expected = -(p * p.clamp_min(1e-30).log()).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    gradients = []
    for chunk in (None, 3, 20):
        value = entropy_loss(rows, codes, chunk)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        gradients.append(torch.autograd.grad(value, (rows, codes)))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-4)


def test_entropy_loss_only_when_weighted():
    z = torch.randn(2, 4, 3)
    weighted = VectorQuantizer(16, 4, entropy_weight=0.1)
    rows = F.normalize(z, dim=1).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(weighted(z).losses["entropy"], 0.1 * entropy_loss(rows, weighted.codes()))
    assert "entropy" not in VectorQuantizer(16, 4)(z).losses


def test_autocast_does_not_reach_the_search():
    quantizer, z = VectorQuantizer(256, 4), torch.randn(2, 4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
    outside = quantizer(z)
    assert inside.latent.dtype == torch.float32
    assert torch.equal(inside.indices, outside.indices)
    assert torch.equal(inside.losses["codebook"], outside.losses["codebook"])


def train(quantizer, steps, rows=600):
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    for _ in range(steps):
        losses = quantizer(torch.randn(1, quantizer.dim, rows)).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return quantizer


def collapsed(restart_after):
    quantizer = VectorQuantizer(128, 4, restart_after=restart_after)
    with torch.no_grad():  # all codes near one point but for a few: what a young encoder's latents do to them
        quantizer.codebook.copy_(F.normalize(quantizer.codebook * 0.01 + torch.tensor([1.0, 0, 0, 0]), dim=-1))
    return quantizer


def usage(quantizer):
    quantizer.eval()
    return quantizer(torch.randn(1, quantizer.dim, 5000)).indices.unique().numel() / quantizer.codebook_size


def test_restart_fills_a_collapsed_codebook():
    assert usage(train(collapsed(0), 40)) < 0.6
    assert usage(train(collapsed(3), 40)) > 0.9


def test_restart_moves_only_codes_unused_for_the_whole_window():
    quantizer = VectorQuantizer(8, 4, restart_after=2)
    z = quantizer.codes()[:3].detach().t()[None]  # rows equal to the codes 0, 1, 2
    before = quantizer.codebook.detach().clone()
    quantizer(z), quantizer(z)
    assert torch.equal(quantizer.codebook, before), "two steps unused: not yet longer than the window"
    assert quantizer.steps_unused.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    quantizer(z)
    assert torch.equal(quantizer.codebook[:3], before[:3])
    assert not (quantizer.codebook[3:] == before[3:]).all(-1).any()
    rows = F.normalize(z[0].t(), dim=-1)
    assert (torch.cdist(quantizer.codebook[3:], rows).min(-1).values < 1e-5).all(), "moved onto vectors of this batch"


def test_restart_rests_in_eval_mode():
    quantizer = VectorQuantizer(8, 4, restart_after=1).eval()
    before, state = quantizer.codebook.detach().clone(), torch.get_rng_state()
    for _ in range(3):
        quantizer(torch.ones(1, 4, 2))
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.steps_unused.sum() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_restart_resumes_bitwise():
    quantizer = train(collapsed(3), 5)
    state, rng = copy.deepcopy(quantizer.state_dict()), torch.get_rng_state()
    train(quantizer, 5)
    resumed = VectorQuantizer(128, 4, restart_after=3)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    train(resumed, 5)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in quantizer.state_dict().items())


_RANK = """
import json, sys, torch, torch.distributed as dist
from tokar.models.tokenizers.quantizers import VectorQuantizer
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
quantizer = VectorQuantizer(32, 4, restart_after=2)
torch.manual_seed(rank + 1)
for _ in range(6):
    quantizer(torch.randn(1, 4, 10))
print(json.dumps([quantizer.codebook.tolist(), quantizer.steps_unused.tolist()]))
"""


def test_restart_keeps_ranks_equal(tmp_path, root):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, cwd=root, env=environment, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    first, second = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert first == second
    torch.manual_seed(0)
    assert first[0] != VectorQuantizer(32, 4).codebook.tolist(), "some codes were restarted"


@pytest.mark.parametrize("options", [{}, {"entropy_weight": 0.1, "restart_after": 2}])
def test_compiles_to_one_graph(options):
    torch._dynamo.reset()
    quantizer, z = VectorQuantizer(64, 4, **options).eval(), torch.randn(2, 4, 6)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z).indices, quantizer(z).indices)
    quantizer.train()
    compiled(z.requires_grad_()).latent.sum().backward()
    assert z.grad is not None


@pytest.mark.slow
def test_compiles_with_the_real_compiler():
    torch._dynamo.reset()
    quantizer, z = VectorQuantizer(64, 4), torch.randn(2, 4, 6, requires_grad=True)
    ours, plain = torch.compile(quantizer, fullgraph=True)(z), quantizer(z)
    assert torch.equal(ours.indices, plain.indices)
    torch.testing.assert_close(ours.losses, plain.losses)
    sum(ours.losses.values()).backward()
    assert quantizer.codebook.grad.abs().sum() > 0
