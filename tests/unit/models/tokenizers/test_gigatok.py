import pytest
import torch
from tokar.errors import UserError
from tokar.models.build import build, load_model, save_model
from tokar.models.tokenizers.adaptive import AdaptiveDecoder
from tokar.models.tokenizers.conv import ConvEncoder
from tokar.models.tokenizers.gigatok import GigaTok
from tokar.models.tokenizers.latent_transformers import GridTransformer, TokenDecoder, TokenEncoder
from tokar.models.tokenizers.quantizers import VectorQuantizer
from tokar.models.tokenizers.semantic import ProjectionHead
from tokar.models.tokenizers.vit import MultiHeadAttention

CNN = {"width": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "norm_groups": 4, "attention": False}
VIT = {"width": 16, "layers": 2, "heads": 2, "z_channels": 6, "image_size": 8, "patch": 2}


def parts(kind="1d", **change):
    if kind == "1d":
        halves = TokenEncoder(**VIT, tokens=8), TokenDecoder(**VIT, tokens=8)
    else:
        halves = GridTransformer(**VIT), GridTransformer(**VIT, kernel=3)
    return {
        "encoder": ConvEncoder(**CNN),
        "token_encoder": halves[0],
        "quantizer": VectorQuantizer(32, 4),
        "token_decoder": halves[1],
        "decoder": AdaptiveDecoder(**CNN),
        "semantic": ProjectionHead(16, dim=5, depth=1),
        "image_size": 8,
    } | change


@pytest.fixture(params=["1d", "2d"])
def model(request):
    return awake(GigaTok(**parts(request.param))).eval()


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
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_layouts():
    row, grid = (GigaTok(**parts(kind)).layout for kind in ("1d", "2d"))
    assert (row.kind, row.total_tokens, row.streams[0].grid, row.stride) == ("sequence", 8, None, 0)
    assert (grid.kind, grid.total_tokens, grid.streams[0].grid, grid.stride) == ("raster", 16, (4, 4), 2)
    for layout in (row, grid):
        assert (layout.image_size, layout.multiple_of, layout.vocab_size) == ((8, 8), 0, 32)
        assert layout.streams[0].embed_dim == 4
        assert not layout.prefix_decodable


def test_encode_decode_round_trip_equals_forward(model, image):
    output, encoded = model(image), model.encode(image)
    rows, columns = model.token_encoder.size_out
    assert output.codes.shape == (2, model.layout.total_tokens)
    assert output.z_before.shape == output.z_quantized.shape == (2, 4, rows, columns)
    assert (encoded.reconstruction, encoded.shortcut, encoded.semantic, output.shortcut) == (None, None, None, None)
    assert torch.equal(encoded.codes, output.codes)
    torch.testing.assert_close(model.embed(output.codes), output.z_quantized, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction, rtol=0, atol=1e-5)
    assert torch.equal(model.decode(output.z_quantized), output.reconstruction)


def test_semantic_features_leave_the_layer_they_should(model, image):
    seen = []
    handle = model.token_decoder.layers[0].register_forward_hook(lambda module, inputs, result: seen.append(result))
    semantic = model(image).semantic
    handle.remove()
    assert semantic.shape == (2, 16, 5)
    torch.testing.assert_close(semantic, model.semantic.mlp(seen[0]))
    model.semantic = None
    assert model(image).semantic is None


def test_shortcut_bypasses_transformers_and_quantizer(model, image):
    output = model(image, auxiliary=True)
    spatial = model.encoder(image)
    restored, _ = model.token_decoder(model.post_quant_conv(output.z_quantized))
    assert torch.equal(output.shortcut, model.decoder(spatial))
    torch.testing.assert_close(output.losses["feature"], (spatial - restored).square().mean())
    assert "feature" not in model(image).losses
    gradients = torch.autograd.grad(output.shortcut.square().mean(), list(model.parameters()), allow_unused=True)
    reached = {name.split(".")[0] for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is not None}
    assert reached == {"encoder", "decoder"}


def test_feature_loss_pulls_the_decoder_not_its_target(image):
    torch.manual_seed(0)
    model = GigaTok(**parts(feature_weight=3.0))
    output = model(image, auxiliary=True)
    spatial = model.encoder(image)
    through = torch.autograd.grad(output.losses["feature"], model.token_decoder.conv_out.bias, retain_graph=True)[0]
    restored, _ = model.token_decoder(model.post_quant_conv(output.z_quantized))
    expected = 3.0 * 2 * (restored - spatial).sum((0, 2, 3)) / spatial.numel()  # of the mean square, target held fixed
    torch.testing.assert_close(through, expected, rtol=1e-3, atol=1e-6)
    assert model.decoder.conv_out.weight.grad is None


def test_the_last_layer_sees_the_reconstruction_last(model, image):
    seen = []
    model.last_layer().register_forward_hook(lambda module, inputs, result: seen.append(result))
    output = model(image, auxiliary=True)
    assert torch.equal(seen[-1], output.reconstruction)


def test_every_parameter_gets_a_gradient(model, image):
    output = model.train()(image)
    total = output.reconstruction.square().mean() + output.semantic.square().mean() + sum(output.losses.values())
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_initialisation_spares_what_the_original_spares():
    torch.manual_seed(0)
    model = GigaTok(**parts())
    for weight in (model.encoder.conv_in.weight, model.token_encoder.embed.weight, model.semantic.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.decoder.conv_out.bias.abs().max() == 0
    assert model.quant_conv.weight.std().item() > 0.1
    assert model.quant_conv.bias.abs().max() > 0
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    assert all(attention.weight.std() > 0.1 for attention in attentions)


def test_misfits_are_refused_in_one_line(model):
    total = model.layout.total_tokens
    with pytest.raises(UserError, match=r"^an image of 16x8 pixels, but this tokenizer takes 8x8 alone; resize"):
        model.encode(torch.zeros(1, 3, 16, 8))
    with pytest.raises(UserError, match=rf"5 codes per image, but the layout has {total}"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(UserError, match="cannot decode a prefix"):
        model.decode_partial(torch.zeros(1, total, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": AdaptiveDecoder(**CNN | {"z_channels": 7})}, "z_channels is 6 in token_decoder, 7 in decoder"),
        ({"image_size": 16}, r"stride 2, but the transformers see a grid of \(4, 4\) for images of \(16, 16\)"),
        ({"encoder": ConvEncoder(**CNN | {"multipliers": (1, 1, 2)})}, "encoder has stride 4"),
        ({"token_decoder": TokenDecoder(**VIT, tokens=4)}, "give both the same image_size, patch and tokens"),
        ({"token_decoder": GridTransformer(**VIT)}, "give both the same image_size, patch and tokens"),
        ({"semantic": ProjectionHead(8)}, "semantic.width is 8, token_decoder.width 16"),
        ({"semantic": ProjectionHead(16, depth=3)}, "semantic.depth is 3, but token_decoder has 2 layers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GigaTok(**parts(**change))


def test_autocast_keeps_the_quantizer_in_float32(model, image):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, auxiliary=True)
    assert output.z_quantized.dtype == output.losses["feature"].dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16


def test_compiles_to_one_graph(image):
    torch._dynamo.reset()
    shallow = VIT | {"layers": 1, "tokens": 8}
    model = awake(GigaTok(**parts(token_encoder=TokenEncoder(**shallow), token_decoder=TokenDecoder(**shallow))))
    ours, plain = torch.compile(model, fullgraph=True, backend="eager")(image), model(image)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.reconstruction, plain.reconstruction)
    torch.testing.assert_close(ours.semantic, plain.semantic)


def test_a_model_folder_brings_everything_back(tmp_path, image):
    names = "tokar.models.tokenizers"
    node = {
        "_target_": f"{names}.gigatok.GigaTok",
        "encoder": {"_target_": f"{names}.conv.ConvEncoder", **CNN},
        "token_encoder": {"_target_": f"{names}.latent_transformers.TokenEncoder", **VIT, "tokens": 8},
        "quantizer": {"_target_": f"{names}.quantizers.VectorQuantizer", "codebook_size": 32, "dim": 4},
        "token_decoder": {"_target_": f"{names}.latent_transformers.TokenDecoder", **VIT, "tokens": 8},
        "decoder": {"_target_": f"{names}.adaptive.AdaptiveDecoder", **CNN},
        "semantic": None,
        "image_size": 8,
    }
    model = build(node).eval()
    save_model(tmp_path, node, model.state_dict())
    again = load_model(tmp_path)
    assert torch.equal(again(image).reconstruction, model(image).reconstruction)


def test_learns_to_reconstruct_and_uses_its_codes():
    model = awake(GigaTok(**parts("2d", quantizer=VectorQuantizer(32, 4, restart_after=5), semantic=None)))
    images = torch.rand(8, 3, 2, 2).repeat_interleave(4, -1).repeat_interleave(4, -2) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        output = model(images)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
    assert error < 0.75 * images.var()  # which the mean colour alone would leave
    assert model.eval()(images).codes.unique().numel() > 16
