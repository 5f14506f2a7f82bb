"""Against vector-quantize-pytorch 1.32.0: equal where the definitions agree; where they do not, the comment says how."""

import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    EMAVectorQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
    nearest_code,
)

oracle = pytest.importorskip("vector_quantize_pytorch")
V, D = 24, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def latents(width=D, count=40):
    """The same values twice, as a leaf each: `[2, D, N]` for us, `[2, N, D]` for them."""
    z = torch.randn(2, width, count)
    return z.clone().requires_grad_(), z.movedim(1, -1).clone().requires_grad_()


def compare(ours, z, theirs, x, upstream=None):
    """Values, indices and the gradient that an upstream gradient of the latent makes."""
    latent, indices = theirs[:2]
    torch.testing.assert_close(ours.latent, latent.movedim(-1, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.indices, indices.long())
    upstream = torch.randn_like(ours.latent) if upstream is None else upstream
    (mine,) = torch.autograd.grad(ours.latent, z, upstream, retain_graph=True)
    (other,) = torch.autograd.grad(latent, x, upstream.movedim(1, -1), retain_graph=True)
    torch.testing.assert_close(mine, other.movedim(-1, 1), rtol=1e-4, atol=1e-5)


def like(quantizer, **options):
    """Their VectorQuantize with our codebook."""
    theirs = oracle.VectorQuantize(
        D,
        V,
        use_cosine_sim=quantizer.l2_normalize,
        rotation_trick=quantizer.rotate,
        commitment_weight=quantizer.beta,
        **options,
    )
    book = theirs._codebook
    book.embed.data.copy_(quantizer.codebook.detach())
    book.embed_avg.copy_(quantizer.codebook.detach())
    return theirs


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
def test_moving_average_follows_the_oracle(unit, rotate):
    ours = EMAVectorQuantizer(V, D, l2_normalize=unit, rotate=rotate, decay=0.8)
    ours.codebook.copy_(F.normalize(torch.randn(V, D), dim=-1) if unit else torch.randn(V, D))
    ours.cluster_sum.copy_(ours.codebook)
    theirs = like(ours, decay=0.8)
    for _ in range(4):
        z, x = latents()
        # They normalise the latent outside the gradient of the quantizer's own input too: the same chain as ours.
        mine, other = ours(z), theirs(x)
        compare(mine, z, other, x)
        torch.testing.assert_close(mine.losses["commitment"], other[2].squeeze())
        torch.testing.assert_close(ours.codebook, theirs.codebook)
        torch.testing.assert_close(ours.cluster_size, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.cluster_sum, theirs._codebook.embed_avg[0])


@pytest.mark.parametrize("rotate", [False, True])
def test_a_codebook_learned_by_gradient_has_the_oracles(rotate):
    ours = VectorQuantizer(V, D, beta=1.0, l2_normalize=False, rotate=rotate)
    with torch.no_grad():
        ours.codebook.normal_()
    theirs = like(ours, learnable_codebook=True, ema_update=False)
    z, x = latents()
    mine, other = ours(z), theirs(x)
    compare(mine, z, other, x)
    # Theirs is one loss that moves both sides; ours are two of the same value, one for each side.
    sum(mine.losses.values()).backward()
    other[2].sum().backward()
    torch.testing.assert_close(mine.losses["codebook"], other[2].squeeze())
    torch.testing.assert_close(ours.codebook.grad, theirs._codebook.embed.grad[0])
    torch.testing.assert_close(z.grad, x.grad.movedim(-1, 1))


@pytest.mark.parametrize("rotate", [False, True])
def test_simvq(rotate):
    ours, theirs = SimVQ(V, D, rotate=rotate), oracle.SimVQ(D, V, rotation_trick=rotate)
    theirs.frozen_codebook.copy_(ours.codebook)
    theirs.code_transform.load_state_dict(ours.transform.state_dict())
    z, x = latents()
    mine, other = ours(z), theirs(x)
    compare(mine, z, other, x)
    torch.testing.assert_close(sum(mine.losses.values()), other[2])
    sum(mine.losses.values()).backward()
    other[2].backward()
    torch.testing.assert_close(ours.transform.weight.grad, theirs.code_transform.weight.grad)
    torch.testing.assert_close(z.grad, x.grad.movedim(-1, 1))
    torch.testing.assert_close(ours.embed(mine.indices).movedim(1, -1), theirs.indices_to_codes(other[1]))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (7, 5, 5, 5, 5)])
def test_fsq(levels):
    ours, theirs = FSQ(levels), oracle.FSQ(list(levels))
    z, x = latents(len(levels))
    with torch.no_grad():
        z.mul_(2), x.mul_(2)  # the outermost levels too
    mine = ours(z)
    compare(mine, z, theirs(x), x)
    assert mine.losses == {}
    every = torch.arange(ours.codebook_size)[None]
    torch.testing.assert_close(ours.embed(every).movedim(1, -1), theirs.indices_to_codes(every), rtol=0, atol=0)


@pytest.mark.parametrize("spherical", [False, True])
def test_signs(spherical):
    ours = (BSQ if spherical else LFQ)(D, beta=0.25, entropy_weight=0.1, diversity=0.7, group_bits=D)
    theirs = oracle.LFQ(dim=D, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=0.7, spherical=spherical)
    z, x = latents()
    with torch.no_grad():
        z.mul_(0.05), x.mul_(0.05)  # soft assignments that are not all certain
    # Their highest bit is channel 0, ours (Open-MAGVIT2's) the lowest: their channels are turned around here. Their gradient
    # of the latent stops at the normalised vector's own straight-through, which is ours.
    flipped = x.flip(-1)
    latent, indices, loss = theirs(flipped)
    mine = ours(z)
    compare(mine, z, (latent.flip(-1), indices), x)
    # They clamp p to 1e-5 in both logarithms; ours guards the batch's only.
    torch.testing.assert_close(sum(mine.losses.values()), loss, rtol=2e-3, atol=1e-4)
    (a,) = torch.autograd.grad(sum(mine.losses.values()), z)
    (b,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(a, b.movedim(-1, 1), rtol=2e-2, atol=2e-3)


def test_residual():
    ours = ResidualQuantizer({f"level{k}": EMAVectorQuantizer(V, D, l2_normalize=False, decay=0.8) for k in range(3)})
    theirs = oracle.ResidualVQ(
        dim=D, num_quantizers=3, codebook_size=V, decay=0.8, rotation_trick=False, commitment_weight=0.25
    )
    for level, layer in zip(ours.parts.values(), theirs.layers, strict=True):
        level.codebook.normal_()
        level.cluster_sum.copy_(level.codebook)
        layer._codebook.embed.copy_(level.codebook)
        layer._codebook.embed_avg.copy_(level.codebook)
    for _ in range(3):
        z, x = latents()
        mine, (latent, indices, losses) = ours(z), theirs(x)
        torch.testing.assert_close(mine.latent, latent.movedim(-1, 1))
        assert torch.equal(mine.indices, indices.movedim(-1, 1))
        torch.testing.assert_close(torch.stack(list(mine.losses.values())), losses.flatten())
        # Their three straight-through paths add up to three times the gradient; ours are averaged to the identity.
        (grad,) = torch.autograd.grad(latent.sum(), x, retain_graph=True)
        assert torch.equal(grad, torch.full_like(grad, 3.0))
        (grad,) = torch.autograd.grad(mine.latent.sum(), z, retain_graph=True)
        torch.testing.assert_close(grad, torch.ones_like(grad))
        (a,) = torch.autograd.grad(sum(mine.losses.values()), z)
        (b,) = torch.autograd.grad(losses.sum(), x)
        torch.testing.assert_close(a, b.movedim(-1, 1))
    for level, layer in zip(ours.parts.values(), theirs.layers, strict=True):
        torch.testing.assert_close(level.codebook, layer.codebook)


def test_kmeans_is_as_close_as_the_oracles():
    """Draws differ, so the results do; on average both must come to the same distortion."""
    ours, theirs = [], []
    for _ in range(6):
        z = torch.randn(1, D, 20 * V)
        quantizer = VectorQuantizer(V, D, l2_normalize=False, kmeans_batches=1)
        other = oracle.VectorQuantize(D, V, kmeans_init=True, rotation_trick=False)
        quantizer(z), other(z.movedim(1, -1))
        ours.append(distortion(z, quantizer.codebook.detach()))
        theirs.append(distortion(z, other.codebook))
    assert torch.stack(ours).mean() < 1.03 * torch.stack(theirs).mean()


def distortion(z, codes):
    rows = z[0].t()
    return (rows - codes[nearest_code(rows, codes)]).square().sum(-1).mean()
