import pytest
import torch
from tokar.errors import UserError
from tokar.models.tokenizers.conv import ConvDecoder, ConvEncoder
from tokar.models.tokenizers.quantizers import LFQ, VectorQuantizer
from tokar.models.tokenizers.vqgan import VQGAN

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "norm_groups": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQGAN(ConvEncoder(**SMALL), ConvDecoder(**SMALL), VectorQuantizer(32, 4), image_size=(8, 12)).eval()


def test_layout_describes_the_codes(model):
    stream = model.layout.streams[0]
    assert (model.layout.kind, model.layout.image_size, model.layout.stride) == ("raster", (8, 12), 2)
    assert (stream.grid, stream.n_tokens, stream.vocab_size, stream.embed_dim) == ((4, 6), 24, 32, 4)
    assert model.layout_for((4, 4)).total_tokens == 4


def test_encode_decode_round_trip_equals_forward(model):
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    output, encoded = model(image), model.encode(image)
    assert output.codes.shape == (2, 24)
    assert output.z_before.shape == output.z_quantized.shape == (2, 4, 4, 6)
    assert encoded.reconstruction is None
    assert torch.equal(encoded.codes, output.codes)
    assert torch.equal(model.embed(output.codes), output.z_quantized)
    assert torch.equal(model.decode(output.codes), output.reconstruction)


def test_codes_are_in_raster_order(model):
    codes = torch.arange(24)[None]
    embedded = model.embed(codes)
    assert torch.equal(embedded[0, :, 1, 2], model.quantizer.codes()[1 * 6 + 2])


def test_without_projections_the_latent_is_quantized_as_it_is():
    torch.manual_seed(0)
    model = VQGAN(ConvEncoder(**SMALL), ConvDecoder(**SMALL), LFQ(6), image_size=8, project=False).eval()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    output = model(image)
    assert torch.equal(output.z_before, model.encoder(image))
    assert torch.equal(output.z_quantized, torch.where(output.z_before > 0, 1.0, -1.0))
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    assert not any("quant_conv" in name for name in model.state_dict())
    with pytest.raises(
        ValueError, match="z_channels is 6, but the quantizer's width is 5; make them equal, or set project=true"
    ):
        VQGAN(ConvEncoder(**SMALL), ConvDecoder(**SMALL), LFQ(5), image_size=8, project=False)


def test_other_sizes_encode_and_decode_by_their_grid(model):
    image = torch.rand(1, 3, 6, 4) * 2 - 1
    output = model(image)
    assert output.codes.shape == (1, 6)
    assert torch.equal(model.decode(output.codes.view(1, 3, 2)), output.reconstruction)


def test_misfits_are_refused_with_the_remedy(model):
    with pytest.raises(UserError, match=r"7x12 pixels does not fit.*multiples of 2"):
        model.encode(torch.zeros(1, 3, 7, 12))
    with pytest.raises(UserError, match=r"6 codes per image, but the layout has 24"):
        model.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(UserError, match="cannot decode a prefix"):
        model.decode_partial(torch.zeros(1, 24, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {**SMALL, "z_channels": 5}}, "z_channels is 6 in the encoder, 5 in the decoder"),
        ({"decoder": {**SMALL, "multipliers": (1, 2, 2)}}, "stride is 2 in the encoder, 4 in the decoder"),
        ({"image_size": 9}, "multiples of the stride 2"),
        ({"image_size": (8, 8, 8)}, "two multiples"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VQGAN(
            ConvEncoder(**SMALL),
            ConvDecoder(**change.get("decoder", SMALL)),
            VectorQuantizer(32, 4),
            change.get("image_size", 8),
        )


def test_every_parameter_gets_a_gradient(model):
    output = model.train()(torch.rand(2, 3, 8, 12) * 2 - 1)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_last_layer_writes_the_pixels(model):
    with torch.no_grad():
        model.last_layer().weight.zero_()
        model.last_layer().bias.fill_(0.5)
    assert torch.equal(model(torch.zeros(1, 3, 8, 12)).reconstruction, torch.full((1, 3, 8, 12), 0.5))


def test_autocast_keeps_the_quantizer_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.zeros(1, 3, 8, 12))
    assert output.z_quantized.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16


def test_learns_to_reconstruct_and_uses_its_codes():
    torch.manual_seed(0)
    small = VQGAN(ConvEncoder(**SMALL), ConvDecoder(**SMALL), VectorQuantizer(32, 4, restart_after=5), image_size=8)
    images = torch.rand(16, 3, 2, 2).repeat_interleave(4, -1).repeat_interleave(4, -2) * 2 - 1
    optimizer, history = torch.optim.Adam(small.parameters(), 3e-3), []
    for _ in range(60):
        output = small(images)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
        history.append(error.item())
    assert history[-1] < 0.4 * history[0]
    assert small.eval()(images).codes.unique().numel() > 0.8 * 32


def test_compiles_to_one_graph(model):
    torch._dynamo.reset()
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    ours, plain = compiled(image), model(image)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.reconstruction, plain.reconstruction)
