"""Parallel streams of codes: their order, their names in a layout, and a VQGAN that has them."""

import pytest
import torch
from tokar.models.tokenizers.conv import ConvDecoder, ConvEncoder
from tokar.models.tokenizers.layout import TokenLayout, raster_layout
from tokar.models.tokenizers.quantizers import FSQ, LFQ, ProductQuantizer, ResidualQuantizer, VectorQuantizer
from tokar.models.tokenizers.vqgan import VQGAN

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "norm_groups": 4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def nested():
    left = ResidualQuantizer({"coarse": VectorQuantizer(16, 3, l2_normalize=False), "fine": FSQ([3, 3, 5])})
    return ProductQuantizer({"left": left, "right": LFQ(2)})


def test_streams_are_named_by_the_path_that_leads_to_them():
    assert [tuple(stream) for stream in nested().streams] == [("left_coarse", 16, 3), ("left_fine", 45, 3), ("right", 4, 2)]
    assert [tuple(stream) for stream in LFQ(2).streams] == [("", 4, 2)]


def test_each_level_codes_what_the_others_left():
    quantizer = ResidualQuantizer({"a": LFQ(4), "b": LFQ(4), "c": LFQ(4)}, shrink=0.5)
    z = torch.rand(2, 4, 30) * 3.4 - 1.7
    out = quantizer(z)
    assert ((out.latent - z).abs() <= 0.25 + 1e-6).all(), "signs at halving steps are a binary expansion"
    first = torch.where(z > 0, 1.0, -1.0)
    second = torch.where(z - first > 0, 0.5, -0.5)
    assert torch.equal(quantizer.parts["b"].embed(out.indices[:, 1]) * 0.5, second)
    assert set(out.losses) == {f"{name}_{loss}" for name in "abc" for loss in ("commitment", "entropy")}


def test_losses_of_every_level_reach_the_latent():
    quantizer = ResidualQuantizer({name: VectorQuantizer(8, 4, l2_normalize=False) for name in "abc"})
    z = torch.randn(2, 4, 5, requires_grad=True)
    losses = quantizer(z).losses
    for name in "abc":
        assert torch.autograd.grad(losses[f"{name}_commitment"], z, retain_graph=True)[0].abs().sum() > 0


def test_product_keeps_channels_apart():
    quantizer = ProductQuantizer({"a": VectorQuantizer(8, 3), "b": VectorQuantizer(8, 2)})
    z = torch.randn(2, 5, 7)
    out = quantizer(z)
    for name, piece, stream in (("a", z[:, :3], 0), ("b", z[:, 3:], 1)):
        alone = quantizer.parts[name](piece)
        assert torch.equal(out.indices[:, stream], alone.indices)
        assert torch.equal(out.latent[:, :3] if stream == 0 else out.latent[:, 3:], alone.latent)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"levels: 1 given; name two or more"):
        ResidualQuantizer({"a": LFQ(4)})
    with pytest.raises(ValueError, match=r"widths \{'a': 4, 'b': 3\}; give all the same dim"):
        ResidualQuantizer({"a": LFQ(4), "b": LFQ(3)})
    with pytest.raises(ValueError, match=r"levels \[8, 2\] must each be 3 or more"):
        FSQ([8, 2])


def test_a_vqgan_declares_the_streams_one_after_another():
    model = VQGAN(ConvEncoder(**SMALL), ConvDecoder(**SMALL), nested(), image_size=(8, 12)).eval()
    layout = model.layout
    assert [(s.name, s.n_tokens, s.vocab_size, s.embed_dim, s.grid) for s in layout.streams] == [
        ("patch_left_coarse", 24, 16, 3, (4, 6)), ("patch_left_fine", 24, 45, 3, (4, 6)), ("patch_right", 24, 4, 2, (4, 6)),
    ]  # fmt: skip
    assert (layout.total_tokens, layout.vocab_size) == (72, 45)
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    output = model(torch.rand(2, 3, 8, 12))
    assert output.codes.shape == (2, 72)
    for stream, part in zip(layout.streams, output.codes.split(24, dim=1), strict=True):
        assert part.max() < stream.vocab_size
    assert torch.equal(model.embed(output.codes), output.z_quantized)
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    assert torch.equal(model.decode(output.codes.view(2, 3, 4, 6)), output.reconstruction)


def test_one_stream_leaves_a_layout_as_it_is():
    layout = raster_layout((2, 2), 4, 2, 4)
    assert layout.parallel(LFQ(2).streams) is layout
