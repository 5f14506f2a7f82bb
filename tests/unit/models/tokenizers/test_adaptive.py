import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.adaptive import AdaptiveDecoder, AdaptiveGroupNorm, DepthToSpace, statistics
from tokar.models.tokenizers.conv import ConvDecoder

SMALL = {"width": 8, "multipliers": (1, 2, 4), "blocks": 2, "z_channels": 6, "norm_groups": 4}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_each_channel_lands_in_its_pixel(memory):
    up, width = DepthToSpace(3), 3
    torch.nn.init.zeros_(up.conv.weight)
    with torch.no_grad():
        up.conv.bias.copy_(torch.arange(12.0))  # every output channel shows its own number
    y = up.to(memory_format=memory)(torch.zeros(1, 3, 2, 5).to(memory_format=memory))
    assert y.shape == (1, 3, 4, 10)
    for k in range(4 * width):
        row, column = k // (2 * width), (k // width) % 2
        assert (y[0, k % width, row::2, column::2] == k).all()


def test_depth_to_space_keeps_places_apart():
    torch.manual_seed(0)
    up, x = DepthToSpace(4), torch.randn(2, 4, 3, 5)
    spread = up.conv(x)
    shuffled = F.pixel_shuffle(spread.view(2, 4, 4, 3, 5).transpose(1, 2).reshape(2, 16, 3, 5), 2)  # to its channel order
    torch.testing.assert_close(up(x), shuffled)


def test_adaptive_norm_takes_spread_and_mean_of_the_latent():
    torch.manual_seed(0)
    norm, x, z = AdaptiveGroupNorm(6, 8, 4), torch.randn(2, 8, 3, 3), torch.randn(2, 6, 2, 5) * 3 + 1
    flat = z.flatten(2)
    spread = ((flat - flat.mean(2, keepdim=True)).square().sum(2) / 9 + 1e-6).sqrt()  # 10 places: unbiased
    grouped = x.view(2, 4, -1)
    normal = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = normal.view_as(x) * norm.gamma(spread)[:, :, None, None] + norm.beta(flat.mean(2))[:, :, None, None]
    torch.testing.assert_close(norm(x, *statistics(z)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])  # a quantizer's latent lies so
def test_a_large_bias_leaves_the_next_norm_exact(memory):
    torch.manual_seed(0)
    decoder = AdaptiveDecoder(width=32, multipliers=(2, 1), blocks=2, z_channels=10)
    with torch.no_grad():
        for norm in decoder.adaptive:
            norm.beta.bias.add_(300 * norm.gamma.bias.abs())
    z = torch.randn(2, 10, 4, 4).to(memory_format=memory)
    expected = decoder.double()(z.double())
    ours = decoder.float()(z).double()
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_statistics_of_half_precision_are_summed_in_float32():
    z = (torch.randn(1, 2, 64, 64) + 100).bfloat16()  # in bfloat16 the sum would stop growing
    spread, mean = statistics(z)
    assert spread.dtype == mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean.float(), z.double().mean((2, 3)).float(), rtol=0.005, atol=0)
    torch.testing.assert_close(spread.float(), z.double().var((2, 3)).sqrt().float(), rtol=0.005, atol=0)


def test_decoder_norms_before_each_level_and_upsamples_between_them():
    torch.manual_seed(0)
    decoder, z = AdaptiveDecoder(**SMALL), torch.randn(2, 6, 3, 4)
    assert [norm.gamma.out_features for norm in decoder.adaptive] == [32, 32, 16]  # what enters each level, deepest first
    h = decoder.middle(decoder.conv_in(z))
    for norm, level in zip(decoder.adaptive, decoder.levels, strict=True):
        h = level(norm(h, *statistics(z)))
    expected = decoder.conv_out(F.silu(decoder.norm_out(h)))
    torch.testing.assert_close(decoder(z), expected)
    assert expected.shape == (2, 3, 12, 16)
    assert [type(level.resample) for level in decoder.levels][:2] == [DepthToSpace, DepthToSpace]


def test_without_adaptive_norm_it_is_the_plain_decoder_with_depth_to_space():
    torch.manual_seed(0)
    decoder, z = AdaptiveDecoder(**SMALL, adaptive_norm=False), torch.randn(1, 6, 3, 4)
    assert len(decoder.adaptive) == 0
    torch.testing.assert_close(decoder(z), ConvDecoder.forward(decoder, z))


def test_a_flat_latent_has_a_finite_gradient():
    decoder, z = AdaptiveDecoder(**SMALL), torch.zeros(1, 6, 2, 2, requires_grad=True)
    decoder(z).square().sum().backward()
    assert z.grad.isfinite().all()
