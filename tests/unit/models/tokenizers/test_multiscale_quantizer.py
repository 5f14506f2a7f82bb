import copy

import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.multiscale_quantizer import MultiScaleQuantizer, _draw_evenly, grids_of, phi_of_scale

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(scales=(1, 2, 4), **options):
    quantizer = MultiScaleQuantizer(**{"codebook_size": 32, "dim": 4, "scales": scales, **options})
    with torch.no_grad():
        quantizer.codebook.normal_()  # the small values of a young codebook would hide mistakes
    return quantizer


def reference(quantizer, f, phi_table, phis, unit=False, alpha=0.5, beta=0.25):
    """Codes, f̂ after every scale and the two losses, straight from the paper's algorithm 1 and 2."""
    scales, (h, w) = quantizer.grids, f.shape[-2:]
    rest, f_hat, codes, steps = f.clone(), torch.zeros_like(f), [], []
    table = quantizer.codebook.detach()
    for k, (rows, columns) in enumerate(scales):
        z = F.adaptive_avg_pool2d(rest, (rows, columns)).permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        scores = F.normalize(z, dim=-1) @ F.normalize(table, dim=-1).t() if unit else -torch.cdist(z, table)
        found = scores.argmax(-1)
        up = table[found].view(len(f), rows, columns, -1).permute(0, 3, 1, 2)
        up = up if k == len(scales) - 1 else F.interpolate(up, (h, w), mode="bicubic")
        if phis:
            up = (1 - alpha) * up + alpha * phis[phi_table[k]](up)
        f_hat, rest = f_hat + up, rest - up
        codes.append(found.view(len(f), -1))
        steps.append(f_hat)
    error = torch.stack([F.mse_loss(step, f) for step in steps]).mean()
    return torch.cat(codes, 1), steps, error, beta * error


def test_phi_of_vars_ten_scales():
    assert phi_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


def test_phi_of_other_counts():
    assert phi_of_scale(10, 1) == (0,) * 10
    assert phi_of_scale(1, 4) == (0,)
    assert phi_of_scale(14, 2) == (0,) * 7 + (1,) * 7
    assert all(phi_of_scale(scales, scales) == tuple(range(scales)) for scales in range(1, 30))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([], "are not grids"),
        ([1, [2, 2, 2]], "are not grids"),
        ([1, 4, 2], "do not end with the finest"),
        ([[1, 5], 4], "finest"),
    ],
)
def test_scales_that_are_none_are_refused(scales, message):
    with pytest.raises(ValueError, match=message):
        grids_of(scales)


@pytest.mark.parametrize(
    ("scales", "share", "table"),
    [
        ((1, 2, 4), 4, (0, 2, 3)),
        ((1, 2, 4), 0, (0, 1, 2)),
        ((1, 2, 4), 1, (0, 0, 0)),
        ((1, 1, 2, 4, 4), 2, (0, 0, 0, 1, 1)),
        (([1, 1], [1, 2], [2, 3], [4, 6]), 4, (0, 1, 2, 3)),
        ((3,), 4, (0,)),
    ],
)
@pytest.mark.parametrize("unit", [False, True])
def test_it_is_the_papers_algorithm(scales, share, table, unit):
    quantizer = make(scales, share_phi=share, normalize_search=unit, beta=0.3)
    f = torch.randn(3, 4, *quantizer.grids[-1])
    phis = quantizer.shared_phis if share else quantizer.scale_phis
    assert len(phis) == (share or len(scales))
    latent, codes, losses = quantizer(f)
    expected, steps, codebook, commitment = reference(quantizer, f, table, phis, unit, beta=0.3)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(latent, steps[-1])
    torch.testing.assert_close(losses, {"codebook": codebook, "commitment": commitment})


def test_no_phi_at_ratio_zero():
    quantizer, f = make(phi_ratio=0.0), torch.randn(2, 4, 4, 4)
    assert [name for name, _ in quantizer.named_parameters()] == ["codebook"]
    torch.testing.assert_close(quantizer(f).latent, reference(quantizer, f, (), [])[1][-1])


def test_vars_scales_make_680_tokens():
    quantizer = MultiScaleQuantizer()
    assert sum(quantizer.sizes) == 680
    assert sum(MultiScaleQuantizer(scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).sizes) == 2240
    with torch.no_grad():
        assert quantizer(torch.randn(1, 32, 16, 16)).indices.shape == (1, 680)


def test_each_loss_moves_its_side():
    quantizer, f = make(), torch.randn(2, 4, 4, 4, requires_grad=True)
    learned = list(quantizer.parameters())
    losses = quantizer(f).losses
    gradients = torch.autograd.grad(losses["codebook"], [f, *learned], retain_graph=True, allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().sum() > 0
    assert sum(gradient is not None for gradient in gradients[2:]) == 6, "three of the four phis have a scale here"
    gradients = torch.autograd.grad(losses["commitment"], [f, *learned], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert all(gradient is None for gradient in gradients[1:])


def test_straight_through_gradient_is_the_identity():
    quantizer, f, upstream = make(), torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4)
    (quantizer(f).latent * upstream).sum().backward()
    assert torch.equal(f.grad, upstream)
    assert quantizer.codebook.grad is None


def test_autocast_does_not_reach_the_search():
    quantizer, f = make(VAR_SCALES, codebook_size=512), torch.randn(1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(f)
        grown = quantizer.add_scale(quantizer.start(1), 1, inside.indices[:, 1:5])
    outside = quantizer(f)
    assert inside.latent.dtype == grown.dtype == torch.float32
    assert torch.equal(inside.latent, outside.latent)
    assert torch.equal(inside.indices, outside.indices)
    assert torch.equal(grown, quantizer.add_scale(quantizer.start(1), 1, inside.indices[:, 1:5]))


def test_dropped_scales_are_left_out_of_latent_and_losses():
    quantizer, f = make(scale_dropout=1.0, keep_scales=2), torch.randn(3, 4, 4, 4)
    _, steps, _, _ = reference(quantizer, f, (0, 2, 3), quantizer.shared_phis)
    latent, codes, losses = quantizer(f)  # two of three scales are kept: there is nothing left to draw
    torch.testing.assert_close(latent, steps[1])
    torch.testing.assert_close(losses["codebook"], torch.stack([F.mse_loss(step, f) for step in steps[:2]]).mean())
    assert codes.shape == (3, 21), "codes are those of all scales"
    assert torch.equal(quantizer.eval()(f).indices, codes)
    torch.testing.assert_close(quantizer(f).latent, steps[2])


def test_dropout_draws_from_the_least_kept_and_by_seed():
    quantizer = make((1, 2, 3, 4), scale_dropout=0.5)
    kept = quantizer._draw_kept(4000, torch.device("cpu")).sum(0)
    shares = kept.bincount(minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 1 / 6, 1 / 6, 1 / 6, 1 / 2]), atol=0.03, rtol=0)
    f, latents = torch.randn(8, 4, 4, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        latents.append(quantizer(f).latent)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_dropout_needs_something_to_drop():
    with pytest.raises(ValueError, match="keep_scales 3 leaves none of 3 scales"):
        make(scale_dropout=0.1, keep_scales=3)


def train(quantizer, steps, batch=16):
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    for _ in range(steps):
        losses = quantizer(torch.randn(batch, 1, 1, 1) + torch.randn(batch, quantizer.dim, 4, 4)).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return quantizer


def collapsed(restart_after):
    quantizer = MultiScaleQuantizer(64, 4, (1, 2, 4), restart_after=restart_after)
    with torch.no_grad():
        quantizer.codebook[1:] = 100.0  # all codes but one out of reach
    return quantizer


def used_by_scale(quantizer):
    codes = quantizer.eval()(torch.randn(500, 1, 1, 1) + torch.randn(500, 4, 4, 4)).indices
    return [part.unique().numel() for part in codes.split(quantizer.sizes, dim=1)]


def test_restart_revives_a_collapsed_codebook_on_every_scale():
    assert used_by_scale(train(collapsed(0), 20)) == [1, 1, 1]
    coarse, *_, fine = used_by_scale(train(collapsed(2), 20))
    assert coarse >= 16
    assert fine >= 48


def test_restart_moves_only_what_no_scale_used_for_the_whole_window():
    quantizer, f = make(restart_after=2), torch.randn(2, 4, 4, 4)
    before = quantizer.codebook.detach().clone()
    used = quantizer(f).indices.unique()
    assert torch.equal(quantizer.codebook, before)
    assert torch.equal(quantizer.steps_unused.amin(0).nonzero()[:, 0], torch.tensor(sorted({*range(32)} - {*used.tolist()})))
    quantizer(f)
    same = (quantizer.codebook == before).all(-1)
    assert same[used].all()
    assert same.sum() == used.numel()
    assert quantizer.steps_unused.amin(0).sum() == 0


def test_codes_restart_on_residuals_of_all_scales_evenly():
    parts = [torch.full((2, size, 4), float(scale)) for scale, size in enumerate((1, 4, 16))]
    assert _draw_evenly(parts, 31)[:, 0].long().bincount().tolist() == [11, 10, 10]
    rows = torch.arange(24.0).view(2, 12, 1)
    assert len(_draw_evenly([rows], 24).unique()) == 24, "no row twice while there are others"


def test_restart_rests_in_eval_mode():
    quantizer = make(restart_after=1).eval()
    before, state = quantizer.codebook.detach().clone(), torch.get_rng_state()
    for _ in range(3):
        quantizer(torch.ones(1, 4, 4, 4))
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.steps_unused.sum() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_resumes_bitwise():
    quantizer = MultiScaleQuantizer(64, 4, (1, 2, 4), restart_after=3, scale_dropout=0.5)
    train(quantizer, 5)
    state, rng = copy.deepcopy(quantizer.state_dict()), torch.get_rng_state()
    train(quantizer, 5)
    resumed = MultiScaleQuantizer(64, 4, (1, 2, 4), restart_after=3, scale_dropout=0.5)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    train(resumed, 5)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in quantizer.state_dict().items())


def rank(number, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(32, 4, (1, 2, 4), restart_after=2)
    torch.manual_seed(number + 1)
    for _ in range(6):
        quantizer(torch.randn(2, 4, 4, 4))
    torch.save((quantizer.codebook.detach(), quantizer.steps_unused), folder / f"{number}.pt")


def test_restart_keeps_ranks_equal(tmp_path):
    torch.multiprocessing.start_processes(rank, (tmp_path,), nprocs=2, start_method="fork")
    (first, unused), others = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert torch.equal(first, others[0])
    assert torch.equal(unused, others[1])
    torch.manual_seed(0)
    assert not torch.equal(first, MultiScaleQuantizer(32, 4, (1, 2, 4)).codebook), "some codes were restarted"


@pytest.mark.parametrize("options", [{}, {"restart_after": 2, "scale_dropout": 0.5}])
def test_compiles_to_one_graph(options):
    torch._dynamo.reset()
    quantizer, f = make(**options).eval(), torch.randn(2, 4, 4, 4)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(f).indices, quantizer(f).indices)
    quantizer.train()
    compiled(f.requires_grad_()).latent.sum().backward()
    assert f.grad is not None
