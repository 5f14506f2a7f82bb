"""LlamaGen's VQ tokenizers: names, sizes, and answers of a second implementation written from its description alone."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from published import assert_published, published, section
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.convert.families import get
from tokar.models.convert.family import shapes_of
from tokar.models.convert.parity import load_original, run_parity

FAMILY = get("llamagen_vq")

# Weights of VQ-16 as published: how many tensors, and which shapes. Biases follow from them.
VQ16 = """
encoder.conv_in x1 (128,3,3,3)
encoder.conv_blocks.{0-4}.res.{0-1}.norm1 x10 (128) (256) (512)
encoder.conv_blocks.{0-4}.res.{0-1}.conv1 x10 (128,128,3,3) (256,128,3,3) (256,256,3,3) (512,256,3,3) (512,512,3,3)
encoder.conv_blocks.{0-4}.res.{0-1}.norm2 x10 (128) (256) (512)
encoder.conv_blocks.{0-4}.res.{0-1}.conv2 x10 (128,128,3,3) (256,256,3,3) (512,512,3,3)
encoder.conv_blocks.{0-3}.downsample.conv x4 (128,128,3,3) (256,256,3,3)
encoder.conv_blocks.{2,4}.res.{0}.nin_shortcut x2 (256,128,1,1) (512,256,1,1)
encoder.conv_blocks.{4}.attn.{0-1}.norm x2 (512)
encoder.conv_blocks.{4}.attn.{0-1}.q x2 (512,512,1,1)
encoder.conv_blocks.{4}.attn.{0-1}.k x2 (512,512,1,1)
encoder.conv_blocks.{4}.attn.{0-1}.v x2 (512,512,1,1)
encoder.conv_blocks.{4}.attn.{0-1}.proj_out x2 (512,512,1,1)
encoder.mid.{0,2}.norm1 x2 (512)
encoder.mid.{0,2}.conv1 x2 (512,512,3,3)
encoder.mid.{0,2}.norm2 x2 (512)
encoder.mid.{0,2}.conv2 x2 (512,512,3,3)
encoder.mid.{1}.norm x1 (512)
encoder.mid.{1}.q x1 (512,512,1,1)
encoder.mid.{1}.k x1 (512,512,1,1)
encoder.mid.{1}.v x1 (512,512,1,1)
encoder.mid.{1}.proj_out x1 (512,512,1,1)
encoder.norm_out x1 (512)
encoder.conv_out x1 (256,512,3,3)
decoder.conv_in x1 (512,256,3,3)
decoder.mid.{0,2}.norm1 x2 (512)
decoder.mid.{0,2}.conv1 x2 (512,512,3,3)
decoder.mid.{0,2}.norm2 x2 (512)
decoder.mid.{0,2}.conv2 x2 (512,512,3,3)
decoder.mid.{1}.norm x1 (512)
decoder.mid.{1}.q x1 (512,512,1,1)
decoder.mid.{1}.k x1 (512,512,1,1)
decoder.mid.{1}.v x1 (512,512,1,1)
decoder.mid.{1}.proj_out x1 (512,512,1,1)
decoder.conv_blocks.{0-4}.res.{0-2}.norm1 x15 (512) (256) (128)
decoder.conv_blocks.{0-4}.res.{0-2}.conv1 x15 (512,512,3,3) (256,512,3,3) (256,256,3,3) (128,256,3,3) (128,128,3,3)
decoder.conv_blocks.{0-4}.res.{0-2}.norm2 x15 (512) (256) (128)
decoder.conv_blocks.{0-4}.res.{0-2}.conv2 x15 (512,512,3,3) (256,256,3,3) (128,128,3,3)
decoder.conv_blocks.{0}.attn.{0-2}.norm x3 (512)
decoder.conv_blocks.{0}.attn.{0-2}.q x3 (512,512,1,1)
decoder.conv_blocks.{0}.attn.{0-2}.k x3 (512,512,1,1)
decoder.conv_blocks.{0}.attn.{0-2}.v x3 (512,512,1,1)
decoder.conv_blocks.{0}.attn.{0-2}.proj_out x3 (512,512,1,1)
decoder.conv_blocks.{0-3}.upsample.conv x4 (512,512,3,3) (256,256,3,3) (128,128,3,3)
decoder.conv_blocks.{1,3}.res.{0}.nin_shortcut x2 (256,512,1,1) (128,256,1,1)
decoder.norm_out x1 (128)
decoder.conv_out x1 (3,128,3,3)
quant_conv x1 (8,256,1,1)
post_quant_conv x1 (256,8,1,1)
"""


def our_model(multipliers):
    half = {"multipliers": multipliers}
    with torch.device("meta"):
        return build(
            {
                "_target_": "tokar.models.tokenizers.vqgan.VQGAN",
                "encoder": {"_target_": "tokar.models.tokenizers.conv.ConvEncoder", **half},
                "decoder": {"_target_": "tokar.models.tokenizers.conv.ConvDecoder", **half},
                "quantizer": {"_target_": "tokar.models.tokenizers.quantizers.VectorQuantizer"},
            }
        )


@pytest.mark.parametrize(
    ("multipliers", "millions", "tensors"), [([1, 1, 2, 2, 4], 71.88, 344), ([1, 2, 2, 4], 70.11, 300)], ids=["vq16", "vq8"]
)
def test_published_totals(multipliers, millions, tensors):
    model = our_model(multipliers)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    theirs = FAMILY.to_theirs(model.state_dict())
    assert len(theirs) == tensors
    node = FAMILY.config_from(shapes_of(theirs), {})
    assert node["encoder"]["multipliers"] == node["decoder"]["multipliers"] == multipliers
    assert (node["encoder"]["blocks"], node["decoder"]["blocks"]) == (2, 3)


def test_published_names_and_shapes():
    expected = published(VQ16, (".weight", ".bias"))
    expected |= {"quantize.embedding.weight": {(16384, 8)}, "quantize.codebook_used": {(65536,)}}
    assert_published(shapes_of(FAMILY.to_theirs(our_model([1, 1, 2, 2, 4]).state_dict())), expected)


@pytest.mark.parametrize(("title", "multipliers"), [("VQ-16", [1, 1, 2, 2, 4]), ("VQ-8", [1, 2, 2, 4])])
def test_names_and_shapes_of_the_specification(shared_parity, title, multipliers):
    text = (shared_parity.parent / "specs" / "tokenizers_keys.txt").read_text()
    expected = published(section(text, f"LlamaGen {title}"), ("",))
    assert_published(shapes_of(FAMILY.to_theirs(our_model(multipliers).state_dict())), expected)


# ---- a second implementation, in functions, from the description of the original ----


def reference(state, image, unit):
    """(quant, indices, reconstruction) of an original state dict."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def swish_norm(name, x):
        x = F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def res(name, x):
        h = conv(f"{name}.conv1", swish_norm(f"{name}.norm1", x), padding=1)
        h = conv(f"{name}.conv2", swish_norm(f"{name}.norm2", h), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attend(name, x):
        h = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"], 1e-6)
        q, k, v = (conv(f"{name}.{letter}", h).flatten(2) for letter in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def middle(half, x):
        return res(f"{half}.mid.2", attend(f"{half}.mid.1", res(f"{half}.mid.0", x)))

    def levels(half, x):
        for level in itertools.count():
            stem = f"{half}.conv_blocks.{level}"
            if f"{stem}.res.0.conv1.weight" not in state:
                return x
            for block in itertools.takewhile(lambda b, s=stem: f"{s}.res.{b}.conv1.weight" in state, itertools.count()):
                x = res(f"{stem}.res.{block}", x)
                if f"{stem}.attn.{block}.q.weight" in state:
                    x = attend(f"{stem}.attn.{block}", x)
            if f"{stem}.downsample.conv.weight" in state:
                x = conv(f"{stem}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            if f"{stem}.upsample.conv.weight" in state:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = conv(f"{stem}.upsample.conv", x, padding=1)
        return x

    h = middle("encoder", levels("encoder", conv("encoder.conv_in", image, padding=1)))
    z = conv("quant_conv", conv("encoder.conv_out", swish_norm("encoder.norm_out", h), padding=1)).movedim(1, -1)
    codes = state["quantize.embedding.weight"]
    if unit:
        z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
    found = (z[..., None, :] - codes).square().sum(-1).argmin(-1)
    quant = codes[found].movedim(-1, 1)
    h = levels("decoder", middle("decoder", conv("decoder.conv_in", conv("post_quant_conv", quant), padding=1)))
    return quant, found.flatten(1), conv("decoder.conv_out", swish_norm("decoder.norm_out", h), padding=1)


def random_original(encoder_mult, decoder_mult, ch, z_channels, codebook_size, dim):
    """A random state dict of the original, names and all, by way of our own model."""
    half = {"width": ch, "z_channels": z_channels}
    parts = "tokar.models.tokenizers"
    model = build(
        {
            "_target_": f"{parts}.vqgan.VQGAN",
            "encoder": {"_target_": f"{parts}.conv.ConvEncoder", "multipliers": encoder_mult, **half},
            "decoder": {"_target_": f"{parts}.conv.ConvDecoder", "multipliers": decoder_mult, **half},
            "quantizer": {"_target_": f"{parts}.quantizers.VectorQuantizer", "codebook_size": codebook_size, "dim": dim},
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return {name: value.clone() for name, value in FAMILY.to_theirs(model.state_dict()).items()}


@pytest.mark.parametrize(
    ("encoder_mult", "decoder_mult", "ch", "z_channels", "codebook_size", "dim", "size", "config"),
    [
        ([1, 2], [1, 2], 32, 16, 40, 8, (8, 12), {}),
        ([1, 1, 2, 2], [1, 1, 2, 2], 32, 24, 64, 4, (16, 16), {"ch": 32, "dropout_p": 0.1}),
        ([2, 1, 2], [1, 2, 1], 32, 8, 30, 16, (8, 16), {"codebook_l2_norm": False, "z_channels": 8}),
    ],
)
def test_other_sizes_against_the_second_implementation(
    tmp_path, encoder_mult, decoder_mult, ch, z_channels, codebook_size, dim, size, config
):
    torch.manual_seed(0)
    state = random_original(encoder_mult, decoder_mult, ch, z_channels, codebook_size, dim)
    image = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        quant, found, reconstruction = reference(state, image, config.get("codebook_l2_norm", True))
    tensors = {f"state.{name}": value for name, value in state.items()}
    tensors |= {"in.image": image, "out.quant": quant, "out.indices": found, "out.reconstruction": reconstruction}
    file = tmp_path / "parity.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"config": json.dumps(config)})
    report = run_parity(file)
    assert report.ok, report
    assert {comparison.name for comparison in report.comparisons} == {"quant", "indices", "reconstruction"}


def test_answers_of_the_original(shared_parity):
    report = run_parity(shared_parity / "llamagen_vq.safetensors")
    assert report.family == "llamagen_vq"
    assert report.ok, report
    assert len(report.comparisons) == 3


def test_round_trip_is_bitwise():
    torch.manual_seed(0)
    theirs = random_original([1, 2], [1, 2], 32, 16, 40, 8)
    ours, dropped = FAMILY.to_ours(theirs)
    assert dropped == ["quantize.codebook_used"]
    back = FAMILY.to_theirs(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    again, _ = FAMILY.to_ours(back)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_weights_without_the_usage_window_convert_too():
    theirs = random_original([1, 2], [1, 2], 32, 16, 40, 8)
    del theirs["quantize.codebook_used"]
    assert FAMILY.to_ours(theirs)[1] == []
    assert load_original(FAMILY, theirs, {}, where="x").quantizer.codebook_size == 40


def test_a_config_that_contradicts_the_weights_is_refused():
    theirs = random_original([1, 2], [1, 2], 32, 16, 40, 8)
    with pytest.raises(UserError, match=r"encoder_ch_mult is \[1, 1, 2\] in the config, but \[1, 2\] in the weights"):
        load_original(FAMILY, theirs, {"encoder_ch_mult": [1, 1, 2]}, where="x")


@pytest.mark.parametrize(
    "name", ["decoder.conv_out.bias", "encoder.mid.1.k.weight", "encoder.conv_blocks.1.res.0.conv1.weight", "quant_conv.bias"]
)
def test_a_missing_tensor_is_refused(name):
    theirs = random_original([1, 2], [1, 2], 32, 16, 40, 8)
    del theirs[name]
    with pytest.raises(UserError, match="weights do not fit VQGAN: missing "):
        load_original(FAMILY, theirs, {}, where="x")
