import pytest
import torch
import torch.nn.functional as F
from tokar.models.tokenizers.conv import Attention, ConvDecoder, ConvEncoder, Downsample, ResBlock, Upsample

SMALL = {"width": 8, "multipliers": (1, 2, 4), "z_channels": 6, "norm_groups": 4}


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 8)])
def test_encoder_and_decoder_change_the_resolution_by_their_stride(attention, height, width):
    encoder, decoder = ConvEncoder(**SMALL, blocks=1, attention=attention), ConvDecoder(**SMALL, blocks=2, attention=attention)
    z = encoder(torch.randn(2, 3, height, width))
    assert z.shape == (2, 6, height // 4, width // 4)
    assert decoder(z).shape == (2, 3, height, width)
    assert encoder.stride == decoder.stride == 4


def test_attention_lies_at_the_coarsest_level_and_in_the_middle():
    def places(module):
        return [name for name, child in module.named_modules() if isinstance(child, Attention)]

    assert places(ConvEncoder(**SMALL, blocks=2)) == ["levels.2.attentions.0", "levels.2.attentions.1", "middle.1"]
    assert places(ConvDecoder(**SMALL, blocks=1)) == ["middle.1", "levels.0.attentions.0"]
    assert places(ConvEncoder(**SMALL, attention=False)) == []


@pytest.mark.parametrize("half", [ConvEncoder, ConvDecoder])
def test_widths_that_group_norm_cannot_divide_are_refused(half):
    with pytest.raises(ValueError, match="24 is not a multiple of norm_groups 32; change width or norm_groups"):
        half(width=24)
    with pytest.raises(ValueError, match="multipliers is empty"):
        half(width=32, multipliers=())


def test_attention_equals_the_plain_softmax():
    torch.manual_seed(0)
    attention, x = Attention(8, 4), torch.randn(2, 8, 3, 5)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 8**-0.5, dim=-1)
    plain = x + attention.out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
    torch.testing.assert_close(attention(x), plain, rtol=0, atol=1e-5)


def test_downsample_pads_right_and_bottom():
    down = Downsample(1)
    torch.nn.init.zeros_(down.conv.bias)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 0, 0] = 1  # the top left tap sees the even pixels, none of the padding
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[..., ::2, ::2])


def test_downsample_pads_all_sides_where_asked():
    torch.manual_seed(0)
    down, x = Downsample(2, all_sides=True), torch.randn(1, 2, 4, 6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), expected)
    assert expected.shape == (1, 2, 2, 3)


def test_open_magvit2s_switches():
    sizes = SMALL | {"blocks": 2, "middle_blocks": 3, "bias": False}
    encoder, decoder = ConvEncoder(**sizes, pad_all_sides=True, kernel_out=1), ConvDecoder(**sizes)
    for half in (encoder, decoder):
        assert [type(part) for part in half.middle] == [ResBlock, Attention, ResBlock, ResBlock]
        blocks = [module for module in half.modules() if isinstance(module, ResBlock)]
        assert {name for block in blocks for name, _ in block.named_parameters()} == {
            "norm1.weight", "norm1.bias", "conv1.weight", "norm2.weight", "norm2.bias", "conv2.weight", "shortcut.weight",
        }  # fmt: skip
    assert encoder.conv_in.bias is None
    assert decoder.conv_in.bias is not None
    assert encoder.conv_out.weight.shape[2:] == (1, 1)
    assert [level.resample.conv.padding for level in encoder.levels[:-1]] == [(1, 1), (1, 1)]
    assert decoder(encoder(torch.randn(1, 3, 16, 8))).shape == (1, 3, 16, 8)


def test_upsample_equals_repeating_pixels_and_convolving():
    torch.manual_seed(0)
    up, x = Upsample(2), torch.randn(1, 2, 3, 4, requires_grad=True)
    repeated = up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(up(x), repeated, rtol=0, atol=1e-6)
    tensors = (x, up.conv.weight, up.conv.bias)
    ours, plain = (torch.autograd.grad(y.square().sum(), tensors) for y in (up(x), repeated))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_residual_block_adds_its_input_and_drops_only_in_training():
    torch.manual_seed(0)
    block, x = ResBlock(8, 8, 4, dropout=0.5), torch.randn(2, 8, 4, 4)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)))
    torch.testing.assert_close(block.eval()(x), x + h)
    assert not torch.allclose(block.train()(x), x + h)


def test_channels_last_stays_and_gives_the_same_values():
    torch.manual_seed(0)
    encoder, x = ConvEncoder(**SMALL), torch.randn(2, 3, 16, 16)
    expected = encoder(x)
    z = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
