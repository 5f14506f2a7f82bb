import torch
from tokar.models.attention import Attention, Context, KVCache, rope_table, rotate
from tokar.models.layers import RMSNorm, SwiGLU, drop_path, swiglu_hidden

CELLS = [(-1, -1), (0, 0), (0, 1), (2, 3), (15, 7)]


def test_rotary_is_multiplication_by_complex_phases() -> None:
    head_dim, half = 12, 6
    x = torch.randn(2, len(CELLS), 3, head_dim)
    rates = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles = torch.stack([torch.cat((row * rates, column * rates)) for row, column in CELLS])
    phases = torch.polar(torch.ones_like(angles), angles)
    phases[0] = 0
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phases[:, None]).flatten(-2)
    torch.testing.assert_close(rotate(x, rope_table(CELLS, head_dim)), expected)


def test_rotary_zeroes_slots_without_a_place() -> None:
    x = torch.randn(1, len(CELLS), 2, 8)
    rotated = rotate(x, rope_table(CELLS, 8))
    assert (rotated[:, 0] == 0).all()
    torch.testing.assert_close(rotated[:, 1:].norm(dim=-1), x[:, 1:].norm(dim=-1))


def test_rotary_rows_come_first() -> None:
    table = rope_table([(0, 5), (5, 0)], 8)
    assert (table[0, 0, :4] == 1).all()
    assert (table[0, 1, 4:] == 1).all()
    assert (table[0, 0, 4:6] != 1).all()


def test_rotary_keeps_the_type() -> None:
    x = torch.randn(1, len(CELLS), 2, 8, dtype=torch.bfloat16)
    table = rope_table(CELLS, 8)
    torch.testing.assert_close(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_cache_overwrites_what_is_not_committed() -> None:
    cache = KVCache(1, 2, 1, 4, 2, device=torch.device("cpu"), dtype=torch.float32)
    first, second = torch.randn(2, 1, 1, 2), torch.randn(2, 1, 1, 2)
    cache.write(0, second, second)
    keys, _ = cache.write(0, first, first)
    assert keys.shape[2] == 1
    cache.length = 1
    keys, values = cache.write(0, second, -second)
    assert torch.equal(keys, torch.cat((first, second), dim=2))
    assert torch.equal(values, torch.cat((first, -second), dim=2))


def test_cache_rows_share_memory() -> None:
    cache = KVCache(2, 3, 1, 4, 2, device=torch.device("cpu"), dtype=torch.float32)
    cache.rows(1, 3).write(1, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    assert cache.keys[1, :, 0, 0, 0].tolist() == [0, 1, 1]
    assert cache.keys[0].sum() == 0


@torch.no_grad()
def test_cached_attention_equals_causal_attention() -> None:
    torch.manual_seed(0)
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    rope = rope_table([(index,) for index in range(5)], 8)
    full = attention(x, Context(rope, causal=True), 0)
    cache = KVCache(1, 2, 2, 5, 8, device=x.device, dtype=x.dtype)
    steps = []
    for index in range(5):
        steps.append(attention(x[:, index : index + 1], Context(rope[:, index : index + 1], cache=cache), 0))
        cache.length = index + 1
    torch.testing.assert_close(torch.cat(steps, dim=1), full)


def test_rms_norm_casts_before_the_weight() -> None:
    norm, x = RMSNorm(8), torch.randn(3, 8, dtype=torch.bfloat16) * 3
    torch.nn.init.normal_(norm.weight)
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    assert torch.equal(norm(x), expected)


def test_swiglu() -> None:
    assert [swiglu_hidden(dim, 256) for dim in (768, 1024, 1280, 1536, 3200)] == [2048, 2816, 3584, 4096, 8704]
    layer, x = SwiGLU(4, 6), torch.randn(2, 4)
    gate, up = layer.gate_up.weight.chunk(2)
    hidden = x @ gate.T
    torch.testing.assert_close(layer(x), (hidden * hidden.sigmoid() * (x @ up.T)) @ layer.down.weight.T)


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 1, 2)
    dropped = drop_path(x, 0.25, training=True)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped[:, 0, 0] == dropped[:, 0, 1]).all()
    assert abs(dropped.mean().item() - 1) < 0.05
    assert drop_path(x, 0.25, training=False) is x
