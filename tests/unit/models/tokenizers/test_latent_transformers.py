import math

import pytest
import torch
from tokar.models.layers import sincos_table
from tokar.models.tokenizers.latent_transformers import (
    GridTransformer,
    TokenDecoder,
    TokenEncoder,
    pooling_matrix,
    pooling_sizes,
)
from torch.nn.functional import avg_pool2d

SMALL = {"width": 16, "layers": 3, "heads": 2, "z_channels": 6, "image_size": 16, "patch": 4}
ROW = SMALL | {"tokens": 8}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_groups_of_queries():
    assert [rows * columns for rows, columns in pooling_sizes(256)] == [1, 1, 2, 4, 8, 16, 32, 64, 128]
    assert pooling_sizes(256)[:6] == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
    assert pooling_sizes(1) == [(1, 1)]
    for power in range(12):
        assert sum(rows * columns for rows, columns in pooling_sizes(2**power)) == 2**power


@pytest.mark.parametrize(("tokens", "grid"), [(256, (16, 16)), (16, (4, 4)), (8, (6, 10)), (64, (8, 8)), (1, (3, 3))])
def test_queries_begin_as_averages_from_coarse_to_fine(tokens, grid):
    patches = torch.randn(2, 5, *grid)
    pooled = [avg_pool2d(patches, (grid[0] // rows, grid[1] // columns)).flatten(2) for rows, columns in pooling_sizes(tokens)]
    ours = pooling_matrix(tokens, grid) @ patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, torch.cat(pooled, dim=2).transpose(1, 2), rtol=0, atol=1e-6)
    assert tokens == 1 or torch.equal(ours[:, 0], ours[:, 1])  # only their positions tell the first two apart


def test_token_counts_that_cannot_be_pooled_are_refused():
    with pytest.raises(ValueError, match="12 tokens are not a power of two"):
        TokenEncoder(**SMALL | {"tokens": 12})
    with pytest.raises(ValueError, match=r"4x8 blocks, which do not divide a grid of 4x4 patches; take fewer tokens"):
        TokenEncoder(**SMALL | {"tokens": 64})
    assert TokenEncoder(**SMALL | {"tokens": 12}, queries="learned").size_out == (1, 12)


@pytest.mark.parametrize("queries", ["pooled", "mean", "learned"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_token_encoder_step_by_step(queries, qk_norm):
    model, z = TokenEncoder(**ROW, queries=queries, qk_norm=qk_norm), torch.randn(2, 6, 4, 4)
    values = model.embed(model.norm_in(z.flatten(2).transpose(1, 2)))
    x = {
        "pooled": lambda: model.query_proj(pooling_matrix(8, (4, 4)) @ values),
        "mean": lambda: model.query_proj(values.mean(1, keepdim=True).repeat(1, 8, 1)),
        "learned": lambda: model.queries.repeat(2, 1, 1),
    }[queries]()
    for layer in model.layers:
        x = layer(x, model.token_positions, (values + model.positions, values))
    expected = torch.einsum("bnw,zw->bzn", model.norm_out(x), model.conv_out.weight[:, :, 0, 0])
    expected = expected + model.conv_out.bias[:, None]
    torch.testing.assert_close(model(z)[0], expected[:, :, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", ["first", "learned"])
def test_token_decoder_step_by_step(queries):
    model, z = TokenDecoder(**ROW, queries=queries), torch.randn(2, 6, 1, 8)
    values = model.embed(model.norm_in(z.flatten(2).transpose(1, 2)))
    x = (model.queries if queries == "learned" else values[:, :1]).expand(2, 16, 16)
    seen = []
    for layer in model.layers:
        x = layer(x, model.positions, (values + model.token_positions, values))
        seen.append(x)
    expected = model.conv_out(model.norm_out(x).transpose(1, 2).reshape(2, 16, 4, 4))
    restored, tapped = model(z, 2)
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tapped, seen[1])
    assert model(z)[1] is None


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "cross", "twin"])
def test_grid_transformer_step_by_step(kind, kernel):
    model, z = GridTransformer(**SMALL, layer=kind, kernel=kernel), torch.randn(2, 6, 4, 4)
    x = model.embed(model.norm_in(z.flatten(2).transpose(1, 2)))
    places = model.positions
    if kind == "plain":
        x = x + places
    for layer in model.layers:
        memory = (x + places, x) if kind == "cross" else None
        x = layer(x) if kind == "plain" else layer(x, places, memory)
    expected = model.conv_out(model.norm_out(x).transpose(1, 2).reshape(2, 16, 4, 4))
    torch.testing.assert_close(model(z)[0], expected, rtol=0, atol=1e-5)


def test_maps_have_the_memory_format_of_the_weights():
    model, z = GridTransformer(**SMALL, kernel=3), torch.randn(1, 6, 4, 4)
    assert model(z)[0].is_contiguous()
    model = model.to(memory_format=torch.channels_last)
    assert model(z.to(memory_format=torch.channels_last))[0].is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_not_square():
    sizes = {"image_size": (8, 24)}
    z = torch.randn(1, 6, 2, 6)
    h, _ = TokenEncoder(**ROW | sizes)(z)
    assert h.shape == (1, 6, 1, 8)
    assert TokenDecoder(**ROW | sizes)(h)[0].shape == z.shape


def test_the_pooling_table_is_real_in_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = TokenEncoder(**ROW)
    assert torch.equal(model.pool, pooling_matrix(8, (4, 4)))
    assert "pool" not in model.state_dict()


def test_sincos_positions_put_the_tokens_at_the_averages_of_their_blocks():
    grid = (4, 8)
    encoder = TokenEncoder(32, 1, 4, 16, 8, (16, 32), 4, positions="sincos")
    decoder = TokenDecoder(32, 1, 4, 16, 8, (16, 32), 4, positions="sincos")
    patches = sincos_table(grid, 32)
    places = [[(row, column) for column in range(8)] for row in range(4)]
    row, column = places[2][5]
    rates = [10000 ** (-i / 8) for i in range(8)]
    expected = [f(place * rate) for place in (row, column) for f in (math.sin, math.cos) for rate in rates]
    torch.testing.assert_close(patches[row * 8 + column], torch.tensor(expected))
    for module in (encoder, decoder):
        torch.testing.assert_close(module.positions.detach(), patches)
        torch.testing.assert_close(module.token_positions[0].detach(), patches.mean(0))
        torch.testing.assert_close(module.token_positions[2].detach(), patches.unflatten(0, grid)[:, :4].mean((0, 1)))


def test_sincos_positions_need_a_width_of_fours():
    with pytest.raises(ValueError, match="not a multiple of 4"):
        sincos_table((2, 2), 30)
