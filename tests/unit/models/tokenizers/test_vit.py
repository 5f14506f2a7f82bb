import pytest
import torch
from tokar.models.tokenizers.vit import (
    DecoderLayer,
    EncoderLayer,
    MultiHeadAttention,
    grid_of,
    init_truncated,
    position_table,
)
from torch import nn


def twin(attention):
    """PyTorch's own attention with the same weights."""
    theirs = nn.MultiheadAttention(attention.weight.shape[1], attention.heads, batch_first=True)
    names = {"in_proj_weight": attention.weight, "in_proj_bias": attention.bias}
    theirs.load_state_dict(names | {f"out_proj.{name}": value for name, value in attention.out.named_parameters()})
    return theirs.eval()


def noisy(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("width", "heads", "queries", "keys"), [(24, 3, 5, 7), (16, 1, 4, 4), (32, 8, 1, 9)])
def test_attention_equals_pytorchs_with_its_gradients(width, heads, queries, keys):
    attention = noisy(MultiHeadAttention(width, heads))
    query = torch.randn(2, queries, width, requires_grad=True)
    key, value = (torch.randn(2, keys, width, requires_grad=True) for _ in range(2))
    ours, plain = attention(query, key, value), twin(attention)(query, key, value, need_weights=False)[0]
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), (query, key, value)) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_attention_starts_as_pytorchs_does():
    attention, plain = MultiHeadAttention(64, 4), nn.MultiheadAttention(64, 4)
    assert attention.bias.abs().max() == 0
    for ours, theirs in ((attention.weight, plain.in_proj_weight), (attention.out.weight, plain.out_proj.weight)):
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_normalised_queries_and_keys_do_not_feel_the_scale_of_their_input():
    attention = MultiHeadAttention(16, 2, qk_norm=True)  # biases are zero, so that scaling passes through
    query, key, value = torch.randn(3, 2, 6, 16)
    torch.testing.assert_close(attention(100 * query, 50 * key, value), attention(query, key, value), rtol=0, atol=1e-3)
    plain = MultiHeadAttention(16, 2)
    assert not torch.allclose(plain(100 * query, 50 * key, value), plain(query, key, value), atol=1e-2)


def test_normalised_queries_and_keys_head_by_head():
    attention = noisy(MultiHeadAttention(12, 3, qk_norm=True))
    query, key, value = torch.randn(1, 2, 12), torch.randn(1, 5, 12), torch.randn(1, 5, 12)
    parts = zip((query, key, value), attention.weight.chunk(3), attention.bias.chunk(3), strict=True)
    q, k, v = ((x @ weight.T + bias)[0].split(4, dim=1) for x, weight, bias in parts)
    heads = [torch.softmax(attention.norm_q(a) @ attention.norm_k(b).T / 2, -1) @ c for a, b, c in zip(q, k, v, strict=True)]
    expected = attention.out(torch.cat(heads, dim=1))[None]
    torch.testing.assert_close(attention(query, key, value), expected, rtol=0, atol=1e-5)


def test_encoder_layer_step_by_step():
    layer, x = noisy(EncoderLayer(24, 3)), torch.randn(2, 5, 24)
    u = layer.norm1(x)
    y = x + twin(layer.self_attention)(u, u, u, need_weights=False)[0]
    y = y + layer.mlp(layer.norm2(y))
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remembers", [True, False])
def test_decoder_layer_step_by_step(remembers):
    layer, x, positions = noisy(DecoderLayer(24, 3)), torch.randn(2, 5, 24), torch.randn(5, 24)
    values, places = torch.randn(2, 7, 24), torch.randn(7, 24)
    u = layer.norm1(x)
    y = x + twin(layer.self_attention)(u + positions, u + positions, u, need_weights=False)[0]
    u = layer.norm2(y)
    key, value = (values + places, values) if remembers else (u + positions, u)
    y = y + twin(layer.cross_attention)(u + positions, key, value, need_weights=False)[0]
    y = y + layer.mlp(layer.norm3(y))
    memory = (values + places, values) if remembers else None
    torch.testing.assert_close(layer(x, positions, memory), y, rtol=0, atol=1e-5)


def test_initialisation():
    part = nn.Sequential(DecoderLayer(64, 4), nn.Conv2d(64, 64, 3), nn.GroupNorm(4, 64))
    kept = part[0].self_attention.weight.clone()
    init_truncated(part)
    for weight in (part[0].mlp[0].weight, part[0].cross_attention.out.weight, part[1].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(bias.abs().max() == 0 for bias in (part[0].mlp[2].bias, part[1].bias))
    assert torch.equal(part[0].self_attention.weight, kept)
    assert part[2].weight.min() == part[0].norm3.weight.min() == 1
    assert position_table(64, 256).std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_misfits_are_refused_with_the_remedy():
    assert grid_of((8, 12), 4) == (2, 3)
    with pytest.raises(ValueError, match=r"width of 24 is not a multiple of 5 heads; change"):
        MultiHeadAttention(24, 5)
    with pytest.raises(ValueError, match=r"30x30 is not a multiple of patches of 4 pixels; change"):
        grid_of(30, 4)
