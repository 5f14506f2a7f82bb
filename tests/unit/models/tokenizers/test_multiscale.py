import pytest
import torch
import torch.nn.functional as F
from tokar.errors import UserError
from tokar.models.tokenizers.conv import ConvDecoder, ConvEncoder
from tokar.models.tokenizers.flexvar import FlexVAR
from tokar.models.tokenizers.layout import TokenLayout
from tokar.models.tokenizers.multiscale import MultiScaleVQ
from tokar.models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from tokar.models.tokenizers.quantizers import FSQ, ResidualQuantizer, VectorQuantizer

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "norm_groups": 4}
SCALES = ([1, 1], [2, 2], [2, 3], [4, 6])
SIZES = [1, 4, 6, 24]


def halves():
    return ConvEncoder(**SMALL), ConvDecoder(**SMALL)


def residual(scales=SCALES, **options):
    model = MultiScaleVQ(*halves(), MultiScaleQuantizer(32, 4, scales, **options))
    with torch.no_grad():
        model.quantizer.codebook.normal_()
    return model


def flex(scales=SCALES, **options):
    return FlexVAR(*halves(), VectorQuantizer(32, 4), scales, **options)


@pytest.fixture(params=[residual, flex])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def image():
    torch.manual_seed(1)
    return torch.rand(2, 3, 8, 12) * 2 - 1


def test_layout_describes_the_codes(model):
    layout = model.layout
    assert (layout.kind, layout.image_size, layout.stride, layout.multiple_of) == ("multiscale", (8, 12), 2, 0)
    assert layout.prefix_decodable
    assert (layout.total_tokens, layout.vocab_size) == (35, 32)
    assert [stream.name for stream in layout.streams] == ["scale0", "scale1", "scale2", "scale3"]
    assert [(stream.n_tokens, stream.scale) for stream in layout.streams] == list(zip(SIZES, range(4), strict=True))
    assert [stream.grid for stream in layout.streams] == [tuple(grid) for grid in SCALES]
    assert all((stream.vocab_size, stream.embed_dim) == (32, 4) for stream in layout.streams)
    assert TokenLayout.from_dict(layout.to_dict()) == layout


def test_encode_decode_round_trip_equals_forward(model, image):
    output, encoded = model(image), model.encode(image)
    assert output.codes.shape == (2, 35)
    assert output.z_before.shape == output.z_quantized.shape == (2, 4, 4, 6)
    assert output.reconstruction.shape == image.shape
    assert encoded.reconstruction is None
    assert torch.equal(encoded.codes, output.codes)
    assert torch.equal(model.embed(output.codes), output.z_quantized)
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    assert torch.equal(model.decode(output.z_quantized), output.reconstruction)


def test_the_accumulator_grows_to_the_latent_and_feeds_what_teacher_forcing_feeds(model, image):
    output = model.encode(image)
    f_hat, inputs = model.start(2), []
    for k, part in enumerate(model.split(output.codes)):
        before = f_hat.clone()
        grown = model.add_scale(f_hat, k, part)
        assert torch.equal(f_hat, before), "the old one stays as it is"
        f_hat = grown
        if k < 3:
            inputs.append(model.next_input(f_hat, k))
            assert inputs[-1].shape == (2, SIZES[k + 1], 4)
    assert torch.equal(f_hat, output.z_quantized)
    assert torch.equal(model.teacher_inputs(output.codes), torch.cat(inputs, 1))
    assert model.teacher_inputs(output.codes).shape == (2, 34, 4)


def test_vectors_may_stand_in_for_codes(model):
    codes = torch.randint(32, (2, 6))
    quantizer = model.quantizer
    vectors = quantizer.codebook[codes] if isinstance(model, MultiScaleVQ) else quantizer.embed(codes).movedim(1, -1)
    f_hat = model.add_scale(model.start(2), 0, torch.zeros(2, 1, dtype=torch.int64))
    assert torch.equal(model.add_scale(f_hat, 2, vectors), model.add_scale(f_hat, 2, codes))


def test_a_later_scale_never_changes_an_earlier_input(model, image):
    codes = model.encode(image).codes
    other = codes.clone()
    other[:, 5:11] = (other[:, 5:11] + 1) % 32  # scale 2: seen by scale 3 only
    first, second = model.teacher_inputs(codes), model.teacher_inputs(other)
    assert torch.equal(first[:, :10], second[:, :10])
    assert not torch.equal(first[:, 10:], second[:, 10:])


def test_whole_scales_decode_alone(model, image):
    output = model(image)
    pictures = {k: model.decode_partial(output.codes, k) for k in (1, 5, 11, 35)}
    assert all(picture.shape == image.shape for picture in pictures.values())
    assert torch.equal(pictures[35], output.reconstruction)
    other = output.codes.clone()
    other[:, 5:] = 0
    assert torch.equal(model.decode_partial(other, 5), pictures[5])
    assert not torch.equal(model.decode_partial(other, 11), pictures[11])


@pytest.mark.parametrize("k", [0, 2, 34, 36, -1])
def test_parts_of_a_scale_are_refused(model, k):
    with pytest.raises(UserError, match=rf"first {k} tokens are not whole scales; decode one of 1, 5, 11, 35 tokens"):
        model.decode_partial(torch.zeros(1, 35, dtype=torch.int64), k)


def test_misfits_are_refused_with_the_remedy(model):
    with pytest.raises(UserError, match=r"8x8 pixels does not fit the scales.*use 8x12 pixels"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"34 codes per image, but the layout has 35"):
        model.decode(torch.zeros(1, 34, dtype=torch.int64))
    with pytest.raises(UserError, match=r"code 32 is not one of the 32"):
        model.decode(torch.full((1, 35), 32))
    with pytest.raises(UserError, match=r"code -1 is not one of the 32"):
        model.decode_partial(torch.full((1, 35), -1), 5)


@pytest.mark.parametrize("make", [residual, flex])
def test_scales_must_fit_the_image(make):
    assert make().layout.image_size == (8, 12)
    parts = (*halves(), MultiScaleQuantizer(32, 4, SCALES)) if make is residual else (*halves(), VectorQuantizer(32, 4), SCALES)
    target = MultiScaleVQ if make is residual else FlexVAR
    assert target(*parts, image_size=(8, 12)).layout.image_size == (8, 12)
    with pytest.raises(ValueError, match=r"the finest scale \(4, 6\) at stride 2 describes \(8, 12\) pixels, not .*\(16, 16\)"):
        target(*parts, image_size=16)
    with pytest.raises(ValueError, match="kernel 2 has no centre"):
        target(*parts, kernel=2)
    with pytest.raises(ValueError, match="z_channels is 6 in the encoder, 5 in the decoder"):
        target(parts[0], ConvDecoder(**{**SMALL, "z_channels": 5}), *parts[2:])


@pytest.mark.parametrize("make", [residual, flex])
def test_every_parameter_gets_a_gradient(make, image):
    model = make(share_phi=0) if make is residual else make()
    output = model.train()(image)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_last_layer_writes_the_pixels(model, image):
    with torch.no_grad():
        model.last_layer().weight.zero_()
        model.last_layer().bias.fill_(0.5)
    assert torch.equal(model(image).reconstruction, torch.full_like(image, 0.5))


def test_autocast_keeps_the_quantizer_in_float32(model, image):
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(image)
    assert output.z_quantized.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())


def test_one_scale_alone_has_no_teacher_input(image):
    for make in (residual, flex):
        model = make(([4, 6],)).eval()
        output = model(image)
        assert model.teacher_inputs(output.codes).shape == (2, 0, 4)
        assert torch.equal(model.decode_partial(output.codes, 24), output.reconstruction)


# ---- what is FlexVAR's own ----


def test_each_scale_codes_the_shrunk_latent_itself(image):
    model = flex().eval()
    output = model.encode(image)
    for grid, part in zip(SCALES, model.split(output.codes), strict=True):
        shrunk = F.adaptive_avg_pool2d(output.z_before, grid)
        assert torch.equal(part, model.quantizer(shrunk).indices.flatten(1))
    assert torch.equal(output.z_quantized, model.quantizer(output.z_before).latent)


def test_a_generator_sees_the_last_scale_enlarged():
    model, codes = flex(), torch.randint(32, (2, 35))
    vectors = model.quantizer.embed(codes[:, 1:5].unflatten(1, (2, 2)))
    expected = F.interpolate(vectors, (2, 3), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.equal(model.teacher_inputs(codes)[:, 4:10], expected)


def test_a_prefix_is_decoded_at_its_own_size_and_enlarged(image):
    model = flex().eval()
    codes = model.encode(image).codes
    small = model.decode(model.quantizer.embed(codes[:, 5:11].unflatten(1, (2, 3))))
    assert small.shape == (2, 3, 4, 6)
    assert torch.equal(model.decode_partial(codes, 11), F.interpolate(small, (8, 12), mode="bicubic"))


def test_training_draws_scales_by_seed_and_compares_them_with_the_shrunk_image(image):
    model, results = flex().train(), []
    for seed in (3, 3):
        torch.manual_seed(seed)
        results.append(model(image))
    assert set(results[0].losses) == {"codebook", "commitment", "coarse"}
    assert torch.equal(results[0].losses["coarse"], results[1].losses["coarse"])
    torch.manual_seed(3)
    errors = []
    for rows, columns in model._draw():
        latent = model.quantizer(F.adaptive_avg_pool2d(results[0].z_before, (rows, columns))).latent
        target = F.adaptive_avg_pool2d(image, (2 * rows, 2 * columns))
        errors.append(F.mse_loss(model.decode(latent), target))
    torch.testing.assert_close(results[0].losses["coarse"], torch.stack(errors).mean())
    assert "coarse" not in model.eval()(image).losses
    assert "coarse" not in flex(drawn_scales=0).train()(image).losses


def test_drawn_grids_are_below_the_finest_and_differ():
    model = flex(drawn_scales=3)
    assert sorted(model._draw()) == [(1, 2), (2, 3), (3, 4)]
    with pytest.raises(ValueError, match="drawn_scales 4 exceeds the 3 grids below the finest"):
        flex(drawn_scales=4)


def test_any_quantizer_of_single_codes_serves(image):
    model = FlexVAR(*halves(), FSQ((5, 5, 5)), SCALES).eval()
    output = model(image)
    assert model.layout.vocab_size == 125
    assert torch.equal(model.decode(output.codes), output.reconstruction)
    with pytest.raises(ValueError, match="ResidualQuantizer gives several codes to a position"):
        FlexVAR(*halves(), ResidualQuantizer({"a": VectorQuantizer(8, 4), "b": VectorQuantizer(8, 4)}), SCALES)


@pytest.mark.parametrize("make", [residual, flex])
def test_learns_digits_and_keeps_coarse_scales_alive(make):
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:64]).float()[:, None].expand(-1, 3, -1, -1) / 8 - 1
    options = {"restart_after": 5} if make is residual else {}
    model = make((1, 2, 4), **options)
    optimizer, history = torch.optim.Adam(model.parameters(), 4e-3), []
    for _ in range(80):
        output = model(images)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
        history.append(error.item())
    assert history[-1] < 0.5 * history[0]
    used = [part.unique().numel() for part in model.split(model.eval()(images).codes)]
    assert used[0] >= 3
    assert used[2] >= 12
