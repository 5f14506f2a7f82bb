import pytest
import torch
from tokar.errors import UserError
from tokar.models.build import build, load_model, save_model
from tokar.models.tokenizers.maskgit import MaskGITDecoder
from tokar.models.tokenizers.quantizers import BSQ, ProductQuantizer, VectorQuantizer
from tokar.models.tokenizers.titok import PatchDecoder, PatchEncoder, PixelHead, ProxyHead, TiTok

VIT = {"width": 16, "layers": 2, "heads": 2, "tokens": 6, "image_size": (8, 12), "patch": 4}


def parts(kind="pixels", **change):
    heads = {
        "pixels": lambda: PixelHead(16, patch=4),
        "proxy": lambda: ProxyHead(MaskGITDecoder(4, (1, 2, 2), 1, 5, norm_groups=2), 16, codebook_size=12),
    }
    return {
        "token_encoder": PatchEncoder(**VIT),
        "quantizer": VectorQuantizer(32, 4),
        "token_decoder": PatchDecoder(**VIT),
        "head": heads[kind](),
        "image_size": (8, 12),
        "legacy_reshape": kind == "proxy",
    } | change


@pytest.fixture(params=["pixels", "proxy"])
def model(request):
    return awake(TiTok(**parts(request.param))).eval()


def awake(model):
    """Weights that keep the size of what passes: with those of a start, 0.02 in so few channels, all images look alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


@pytest.fixture
def image():
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_layout():
    layout = TiTok(**parts()).layout
    assert (layout.kind, layout.total_tokens, layout.vocab_size, layout.stride) == ("sequence", 6, 32, 0)
    assert (layout.image_size, layout.multiple_of, layout.prefix_decodable) == ((8, 12), 0, False)
    assert (layout.streams[0].grid, layout.streams[0].embed_dim) == (None, 4)


def test_encode_decode_round_trip_equals_forward(model, image):
    output, encoded = model(image), model.encode(image)
    assert output.codes.shape == (2, 6)
    assert output.z_before.shape == output.z_quantized.shape == (2, 4, 1, 6)
    assert output.reconstruction.shape == image.shape
    assert encoded.reconstruction is None
    assert torch.equal(encoded.codes, output.codes)
    torch.testing.assert_close(model.embed(output.codes), output.z_quantized, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction, rtol=0, atol=1e-5)
    assert torch.equal(model.decode(output.z_quantized), output.reconstruction)


def test_a_quantizer_of_several_streams(image):
    quantizer = ProductQuantizer({"a": VectorQuantizer(32, 4), "b": BSQ(3)})
    model = awake(TiTok(**parts(quantizer=quantizer))).eval()
    output = model(image)
    assert [(stream.n_tokens, stream.vocab_size) for stream in model.layout.streams] == [(6, 32), (6, 8)]
    assert output.codes.shape == (2, model.layout.total_tokens)
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction, rtol=0, atol=1e-5)


def test_networks_see_pixels_from_0_to_1(model, image):
    seen = {}
    model.token_encoder.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.update(image=inputs[0]))
    model.last_layer().register_forward_hook(lambda module, inputs, result: seen.update(pixels=result))
    reconstruction = model(image).reconstruction
    assert 0 <= seen["image"].min() < 0.1 < 0.9 < seen["image"].max() <= 1
    torch.testing.assert_close(reconstruction, 2 * seen["pixels"] - 1)


def test_legacy_tokens_are_read_in_the_order_of_memory(image):
    """`[K, W]` numbers 0, 1, 2, … of an image: channel w of token k is number w·K + k, properly k·W + w."""
    numbers = torch.arange(2 * 6 * 16.0).view(2, 6, 16)
    for legacy in (False, True):
        model = TiTok(**parts(legacy_reshape=legacy))
        seen = []
        model.quant_conv.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        model.token_encoder.forward = lambda image: numbers
        model.encode(image)
        for k, w in ((0, 0), (5, 15), (2, 7), (4, 1)):
            expected = w * 6 + k if legacy else k * 16 + w
            assert seen[0][:, w, 0, k].tolist() == [expected, expected + 96]


def test_legacy_encoding_does_not_depend_on_strides(image):
    model = awake(TiTok(**parts("proxy"))).eval()
    plain = model.encode(image).z_before
    encoder = model.token_encoder.forward
    model.token_encoder.forward = lambda image: encoder(image).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(model.encode(image).z_before, plain)


def test_a_patchs_pixels_lie_row_by_row_with_colours_last():
    head, patches = PixelHead(2, patch=3), torch.zeros(1, 2, 1, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.conv_out.weight[range(3), range(3), 1, 1] = 1.0  # colours pass as they are
        head.conv_in.bias.copy_(torch.arange(27.0))
    image = head(patches)
    assert image.shape == (1, 3, 3, 6)
    for row, column, colour in ((0, 0, 0), (0, 1, 2), (2, 1, 0), (1, 2, 1)):
        assert image[0, colour, row, column] == image[0, colour, row, 3 + column] == (row * 3 + column) * 3 + colour


def test_every_parameter_gets_a_gradient(model, image):
    output = model.train()(image)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_initialisation():
    torch.manual_seed(0)
    model = TiTok(**parts())
    for weight in (model.token_encoder.patch_embed.weight, model.quant_conv.weight, model.head.conv_in.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.post_quant.bias.abs().max() == 0
    for table in (model.token_encoder.queries, model.token_decoder.positions):
        assert table.std().item() == pytest.approx(16**-0.5, rel=0.3)


def test_misfits_are_refused_in_one_line(model):
    with pytest.raises(UserError, match=r"^an image of 12x8 pixels, but this tokenizer takes 8x12 alone; resize or crop"):
        model.encode(torch.zeros(1, 3, 12, 8))
    with pytest.raises(UserError, match=r"5 codes per image, but the layout has 6"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(UserError, match="code 32 is not one of the 32"):
        model.decode(torch.full((1, 6), 32))
    with pytest.raises(UserError, match="cannot decode a prefix"):
        model.decode_partial(torch.zeros(1, 6, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_decoder": PatchDecoder(**VIT | {"tokens": 5})}, "token_encoder has 6 tokens, token_decoder 5; make"),
        ({"image_size": 16}, "token_encoder has 2x3 patches of 4 pixels, which are not an image of 16x16"),
        ({"token_decoder": PatchDecoder(**VIT | {"image_size": 8})}, "token_decoder has 2x2 patches of 4 pixels"),
        ({"head": PixelHead(8, 4)}, "width is 8 in head, but width is 16 in token_decoder; make them equal"),
        ({"head": PixelHead(16, 2)}, "stride is 2 in head, but patch is 4 in token_decoder; make them equal"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TiTok(**parts(**change))


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="an image of 10x10 is not a multiple of patches of 4 pixels; change one of them"):
        PatchEncoder(**VIT | {"image_size": 10})


def test_autocast_keeps_the_quantizer_in_float32(model, image):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image)
    assert output.z_quantized.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["pixels", "proxy"])
def test_compiles_to_one_graph(head, image):
    torch._dynamo.reset()
    model = awake(TiTok(**parts(head))).eval()
    ours, plain = torch.compile(model, fullgraph=True, backend="eager")(image), model(image)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.reconstruction, plain.reconstruction)


def test_a_model_folder_brings_everything_back(tmp_path, image):
    names = "tokar.models.tokenizers"
    node = {
        "_target_": f"{names}.titok.TiTok",
        "token_encoder": {"_target_": f"{names}.titok.PatchEncoder", **VIT},
        "quantizer": {"_target_": f"{names}.quantizers.ClusteringVectorQuantizer", "codebook_size": 32, "dim": 4},
        "token_decoder": {"_target_": f"{names}.titok.PatchDecoder", **VIT},
        "head": {"_target_": f"{names}.titok.PixelHead", "width": 16, "patch": 4},
        "image_size": [8, 12],
    }
    model = build(node).eval()
    save_model(tmp_path, node, model.state_dict())
    again = load_model(tmp_path)
    assert again.layout == model.layout
    assert torch.equal(again(image).reconstruction, model(image).reconstruction)


def test_learns_to_reconstruct_and_uses_its_codes():
    torch.manual_seed(0)
    model = TiTok(**parts(quantizer=VectorQuantizer(32, 4, l2_normalize=False, restart_after=5)))
    images = torch.rand(8, 3, 1, 1).expand(8, 3, 8, 12) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.9, 0.95))
    for _ in range(200):
        output = model(images)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
    assert error < 0.6 * images.var()  # nothing that does not read the codes comes below 1
    assert model.eval()(images).codes.unique().numel() > 8
