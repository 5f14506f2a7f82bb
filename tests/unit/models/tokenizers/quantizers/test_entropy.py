import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.quantizers import BSQ, IBQ, LFQ, entropy_loss, ibq
from tokar.models.tokenizers.quantizers import entropy as entropy_module
from tokar.models.tokenizers.quantizers.lfq import signs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def dense(z, quantizer, weight=1.0):
    """The entropies over all codes at once, `(sample, batch)`, as LFQ defines them."""
    rows = z.movedim(1, -1).reshape(-1, quantizer.dim)
    codes = quantizer.embed(torch.arange(quantizer.codebook_size)[None])[0].t()
    p = (2 * rows @ codes.t() / quantizer.temperature).softmax(-1).double()
    mean = p.mean(0)
    return -torch.xlogy(p, p).sum(-1).mean(), -torch.xlogy(mean, mean).sum()


def grouped(z, bits, group, diversity, cls=LFQ):
    return cls(bits, entropy_weight=1.0, diversity=diversity, group_bits=group)(z).losses["entropy"].double()


@pytest.mark.parametrize("cls", [LFQ, BSQ])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_entropy_in_groups_of_bits_is_the_dense_one(cls, group):
    z = 0.01 * torch.randn(2, 8, 30)
    z = F.normalize(z, dim=1) * 0.03 if cls is BSQ else z
    quantizer = cls(8, temperature=0.01)
    seen = F.normalize(z, dim=1) if cls is BSQ else z
    sample, batch = dense(seen, quantizer)
    assert 0.1 < sample < batch, "soft enough for the comparison to mean something"
    # Of independent bits the entropy adds up exactly, whatever the groups.
    torch.testing.assert_close(grouped(z, 8, group, 0.0, cls), sample, rtol=1e-4, atol=1e-5)
    # That of their mean over the batch only bounds it from above, and is exact in a single group.
    of_groups = sample - grouped(z, 8, group, 1.0, cls)
    if group == 8:
        torch.testing.assert_close(of_groups, batch, rtol=5e-3, atol=1e-3)
    else:
        assert of_groups > batch - 0.02


def test_entropy_of_groups_is_exact_for_a_batch_of_independent_bits():
    """Every code once: the mean assignment factorises, and groups lose nothing."""
    z = 0.01 * signs(torch.arange(256), 8).t()[None]
    batch = dense(z, LFQ(8))[1]
    for group in (2, 4, 8):
        torch.testing.assert_close(grouped(z, 8, group, 0.0) - grouped(z, 8, group, 1.0), batch, rtol=1e-2, atol=1e-2)


def test_two_to_the_eighteen_codes_fit():
    """Dense scores of these rows would take 4 GiB; groups of nine bits take 16 MiB."""
    z = torch.randn(4, 18, 1024, requires_grad=True)
    out = LFQ(18)(z)
    sum(out.losses.values()).backward()
    assert out.indices.max() > 2**17
    assert z.grad.isfinite().all()


def test_lowest_bit_is_channel_zero_and_zero_is_negative():
    z = torch.tensor([[0.5, -1, -1], [-1, 0.1, -1], [-3, -1, 2], [0, 0, 0]]).t()[None]
    out = LFQ(3)(z)
    assert out.indices.tolist() == [[1, 2, 4, 0]]
    assert out.latent[0, :, 0].tolist() == [1, -1, -1]
    torch.testing.assert_close(BSQ(3)(z).latent[0, :, 0], torch.tensor([1.0, -1, -1]) / 3**0.5)


def one_hot_straight_through(quantizer, z):
    """IBQ as its paper writes it, with all of `[R, V]`."""
    rows, codes = z.movedim(1, -1).reshape(-1, quantizer.dim), quantizer.codebook
    p = (rows @ codes.t()).softmax(-1)
    hard = F.one_hot(p.argmax(-1), len(codes)).float()
    latent = (hard - p.detach() + p) @ codes
    losses = {
        "index": (latent - rows).square().mean(),
        "commitment": ((hard @ codes).detach() - rows).square().mean(),
        "codebook": 0.25 * (hard @ codes - rows.detach()).square().mean(),
    }
    q = (rows @ codes.t() / 0.01).softmax(-1)
    mean = q.mean(0)
    losses["entropy"] = 0.05 * (-torch.xlogy(q, q + 1e-30).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum())
    return latent, losses


@pytest.mark.parametrize("chunk", [1 << 24, 30])
def test_index_backpropagation_is_the_papers_whatever_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(ibq, "CHUNK", chunk)
    monkeypatch.setattr(entropy_module, "CHUNK", chunk)
    quantizer, z = IBQ(10, 4), torch.randn(2, 4, 3, requires_grad=True)
    with torch.no_grad():
        quantizer.codebook.normal_()
    out, (latent, losses) = quantizer(z), one_hot_straight_through(quantizer, z)
    upstream = torch.randn_like(latent)
    torch.testing.assert_close(out.latent.movedim(1, -1).reshape(-1, 4), latent)
    torch.testing.assert_close(out.losses, losses)
    mine = (out.latent.movedim(1, -1).reshape(-1, 4) * upstream).sum() + sum(out.losses.values())
    theirs = (latent * upstream).sum() + sum(losses.values())
    for ours, other in zip(*(torch.autograd.grad(total, (z, quantizer.codebook)) for total in (mine, theirs)), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    assert (torch.autograd.grad(quantizer(z).latent.sum(), quantizer.codebook)[0].abs().sum(-1) > 0).all(), "all codes"


@pytest.mark.slow
def test_chunks_compile_to_one_graph(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(ibq, "CHUNK", 30)
    monkeypatch.setattr(entropy_module, "CHUNK", 30)
    quantizer, z = IBQ(10, 4), torch.randn(2, 4, 3, requires_grad=True)
    out, plain = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(z), quantizer(z)
    torch.testing.assert_close(out.losses, plain.losses)
    ours, theirs = (torch.autograd.grad(sum(each.losses.values()), z)[0] for each in (out, plain))
    torch.testing.assert_close(ours, theirs)
