import copy

import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.quantizers import (
    ClusteringVectorQuantizer,
    EMAVectorQuantizer,
    VectorQuantizer,
    entropy_loss,
    nearest_code,
)


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


@pytest.mark.parametrize("options", [{}, {"entropy_weight": 0.1, "restart_after": 2}])
def test_compiles_to_one_graph(options):
    torch._dynamo.reset()
    quantizer, z = VectorQuantizer(64, 4, **options).eval(), torch.randn(2, 4, 6)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z).indices, quantizer(z).indices)
    quantizer.train()
    compiled(z.requires_grad_()).latent.sum().backward()
    assert z.grad is not None


def householder(z, q):
    """The rotation that takes the direction of z to that of q, and the ratio of their lengths, as a matrix (Fifty et al.)."""
    a, b = F.normalize(z, dim=0), F.normalize(q, dim=0)
    r = F.normalize(a + b, dim=0)
    return q.norm() / z.norm() * (torch.eye(len(z)) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a))


@pytest.mark.parametrize("unit", [True, False])
def test_rotation_keeps_the_value_and_turns_the_gradient(unit):
    plain = VectorQuantizer(16, 4, l2_normalize=unit)
    turned = VectorQuantizer(16, 4, l2_normalize=unit, rotate=True)
    with torch.no_grad():
        plain.codebook.normal_()
    turned.load_state_dict(plain.state_dict())
    z, upstream = torch.randn(1, 4, 5, requires_grad=True), torch.randn(1, 4, 5)
    out = turned(z)
    assert torch.equal(out.latent, plain(z).latent)
    seen = F.normalize(z.detach(), dim=1) if unit else z.detach()
    columns = []
    for place in range(5):
        matrix = householder(seen[0, :, place], out.latent[0, :, place].detach())
        torch.testing.assert_close(matrix @ seen[0, :, place], out.latent[0, :, place].detach(), rtol=1e-5, atol=1e-5)
        columns.append(matrix.t() @ upstream[0, :, place])
    expected = torch.stack(columns, -1)[None]
    if unit:
        torch.testing.assert_close(expected.norm(dim=1), upstream.norm(dim=1)), "a rotation alone"
        (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * expected).sum(), z)
    (grad,) = torch.autograd.grad(out.latent, z, upstream)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("z", [torch.zeros(1, 4, 2), -torch.ones(1, 4, 2)])
def test_rotation_survives_zero_and_opposite_vectors(z):
    quantizer = VectorQuantizer(1, 4, l2_normalize=False, rotate=True)
    with torch.no_grad():
        quantizer.codebook.fill_(1.0)
    z = z.requires_grad_()
    quantizer(z).latent.sum().backward()
    assert z.grad.isfinite().all()


def test_kmeans_takes_the_first_batches_then_rests():
    centres = F.normalize(torch.randn(6, 4), dim=-1)
    quantizer = VectorQuantizer(6, 4, kmeans_batches=2)
    assert quantizer.steps_unused.tolist() == [-2] * 6
    for left in (-1, 0):
        z = (centres[torch.randperm(600) % 6] * torch.rand(600, 1)).t()[None]
        quantizer(z)
        assert quantizer.steps_unused.tolist() == [left] * 6
    assert usage_of(quantizer, z) >= 5 / 6
    book = quantizer.codebook.detach().clone()
    torch.testing.assert_close(book.norm(dim=-1), torch.ones(6))
    assert ((book @ centres.t()).amax(-1) > 0.99).sum() >= 4, "most codes sit on a cluster"
    quantizer(torch.randn(1, 4, 50))
    assert torch.equal(quantizer.codebook, book)


def usage_of(quantizer, z):
    return quantizer.eval()(z).indices.unique().numel() / quantizer.codebook_size


def test_kmeans_with_fewer_vectors_than_codes_fills_up_from_the_next_batches():
    quantizer = VectorQuantizer(64, 4, kmeans_batches=6)
    batches = [torch.randn(1, 4, 20) for _ in range(6)]
    distinct = []
    for batch in batches:
        quantizer(batch)
        distinct.append(quantizer.codebook.detach().unique(dim=0).shape[0])
    assert distinct[0] <= 20
    assert distinct == sorted(distinct)
    assert distinct[-1] > 50
    assert quantizer.codebook.isfinite().all()


def test_weights_from_elsewhere_are_not_started_again():
    loaded = VectorQuantizer(6, 4, kmeans_batches=3)
    loaded.load_state_dict(VectorQuantizer(6, 4).state_dict())
    before = loaded.codebook.detach().clone()
    loaded(torch.randn(1, 4, 50))
    assert torch.equal(loaded.codebook, before)


def test_moving_average_is_the_formula():
    quantizer = EMAVectorQuantizer(3, 2, l2_normalize=False, decay=0.75)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0], [4, 4], [-4, 4]]))
    quantizer.cluster_sum.copy_(quantizer.codebook)
    out = quantizer(torch.tensor([[1.0, 1], [3, 3], [5, 4], [4, 6]]).t()[None])
    assert out.indices.tolist() == [[0, 1, 1, 1]]
    assert torch.equal(out.latent[0, :, 1], torch.tensor([4.0, 4])), "the value of before the update"
    assert quantizer.cluster_size.tolist() == [1.0, 0.75 + 0.25 * 3, 0.75]
    assert quantizer.cluster_sum[1].tolist() == [0.75 * 4 + 0.25 * 12, 0.75 * 4 + 0.25 * 13]
    size, total = quantizer.cluster_size, quantizer.cluster_size.sum()
    expected = quantizer.cluster_sum / ((size + 1e-5) / (total + 3e-5) * total)[:, None]
    torch.testing.assert_close(quantizer.codebook, expected)
    assert set(out.losses) == {"commitment"}
    assert not list(quantizer.parameters()), "nothing for an optimizer to decay"


def test_moving_average_leaves_out_a_step_that_is_not_finite():
    quantizer = EMAVectorQuantizer(8, 4, l2_normalize=False, restart_after=1)
    quantizer(torch.randn(1, 4, 5))
    quantizer(torch.full((1, 4, 5), float("nan")))
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


def test_restart_ignores_vectors_that_are_not_finite():
    quantizer = VectorQuantizer(8, 4, restart_after=1)
    quantizer(torch.randn(1, 4, 5))
    quantizer(torch.full((1, 4, 5), float("inf")))
    assert quantizer.codebook.isfinite().all()


def test_a_restarted_code_of_a_moving_average_starts_anew():
    quantizer = EMAVectorQuantizer(8, 4, restart_after=2, decay=0.5)
    z = quantizer.codes()[:3].t()[None]
    quantizer(z), quantizer(z)
    quantizer(z)
    assert (quantizer.cluster_size[3:] >= 0.5).all(), "one vector, decayed once"
    assert (torch.cdist(quantizer.codes()[3:], quantizer.codes()[:3]).min(-1).values < 1e-3).all()


def test_clustering_draws_idle_codes_to_their_nearest_vectors():
    quantizer = ClusteringVectorQuantizer(4, 2, decay=0.9)
    z = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    old = quantizer.codebook.detach().clone()
    nearest = z[(old[:, None] - z[None]).square().sum(-1).argmin(-1)]
    used = quantizer(z.t()[None]).indices[0]
    frequency = 0.1 * torch.bincount(used, minlength=4) / 3
    torch.testing.assert_close(quantizer.frequency, frequency)
    alpha = torch.exp(-frequency * 4 * 10 / 0.1 - 1e-3)[:, None]
    torch.testing.assert_close(quantizer.codebook.detach(), (1 - alpha) * old + alpha * nearest)
    assert (alpha > 0.99).any(), "some were idle"


def test_clustering_fills_a_codebook_that_gradients_leave_empty():
    filled = []
    for quantizer in (VectorQuantizer(128, 4, l2_normalize=False), ClusteringVectorQuantizer(128, 4)):
        with torch.no_grad():
            quantizer.codebook.mul_(0.01).add_(torch.tensor([1.0, 0, 0, 0]))
        filled.append(usage(train(quantizer, 60)))
    # Codes that double another move together: it frees about one at a step.
    assert filled[1] > filled[0] + 0.3


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"never learns how often.*below 1"):
        ClusteringVectorQuantizer(4, 2, decay=1.0)
