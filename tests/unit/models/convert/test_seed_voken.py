"""Open-MAGVIT2 and IBQ: names, sizes, and answers of a second implementation written from their description alone."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from published import assert_published, published, section
from safetensors.torch import load_file, save_file
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build, load_model
from tokar.models.convert.families import find, get, recognise
from tokar.models.convert.family import shapes_of
from tokar.models.convert.files import convert_file, export_original
from tokar.models.convert.parity import load_original, run_parity

EMA = "model_ema."
TOKENIZERS = {
    "magvit2_256": ("open_magvit2", 339, {"encoder": 49.75, "decoder": 65.38, "": 115.13}),
    "magvit2_128": ("open_magvit2", 283, {"": 112.02}),
    "ibq_1024": ("ibq", 543, {"": 107.05}),
    "ibq_8192": ("ibq", 543, {"": 108.88}),
    "ibq_16384": ("ibq", 543, {"encoder": 46.75, "decoder": 59.90, "": 110.98}),
    "ibq_262144": ("ibq", 543, {"quantizer": 67.11, "": 173.90}),
}
"""Family, tensors and millions of parameters of each part; the description counts IBQ without what is around its codebook."""


def composed(name):
    size = 128 if name == "magvit2_128" else 256
    overrides = [f"tokenizer={name}", "data=imagenet256", f"data.image_size={size}", "loop.duration=1"]
    with torch.device("meta"):
        return build(compose("tokenizer", overrides).typed.tokenizer)


def raw(state):
    return {name: value for name, value in state.items() if not name.startswith(EMA)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_published_totals_and_layout(name):
    family, tensors, totals = TOKENIZERS[name]
    model = composed(name)
    for part, millions in totals.items():
        count = sum(value.numel() for key, value in model.named_parameters() if key.startswith(part))
        assert round(count / 1e6, 2) == millions
    assert model.layout.total_tokens == 256
    assert model.layout.vocab_size == (2**18 if family == "open_magvit2" else int(name.removeprefix("ibq_")))
    theirs = get(family).to_theirs(model.state_dict())
    assert len(raw(theirs)) == tensors
    assert find(theirs).name == family
    with torch.device("meta"):
        again = build(get(family).config_from(shapes_of(theirs), {}), trusted=False)
    assert shapes_of(again.state_dict()) == shapes_of(model.state_dict())
    assert again.layout == model.layout


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("magvit2_256", "SEED-Voken imagenet_lfqgan_256_L"),
        ("magvit2_128", "SEED-Voken imagenet_lfqgan_128_L"),
        ("ibq_16384", "SEED-Voken imagenet_ibqgan_16384"),
    ],
)
def test_names_and_shapes_of_the_specification(shared_parity, name, title):
    text = (shared_parity.parent / "specs" / "tokenizers_keys.txt").read_text()
    theirs = raw(get(TOKENIZERS[name][0]).to_theirs(composed(name).state_dict()))
    halves = {key: shape for key, shape in shapes_of(theirs).items() if key.startswith(("encoder.", "decoder."))}
    assert_published(halves, published(section(text, title)))
    around = {key for key in theirs if key not in halves}
    projections = {f"{conv}.{kind}" for conv in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")}
    assert around == ({"quantize.embedding.weight", *projections} if "ibq" in name else set())


# ---- a second implementation, in functions, from the description of the originals ----


def indices(state, pattern):
    return list(itertools.takewhile(lambda i: f"{pattern.format(i)}.weight" in state, itertools.count()))


def reference(state, image):
    """(quantized latent, indices, reconstruction) of an original state dict."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def norm(name, x):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def res(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)

    def attend(name, x):
        q, k, v = (conv(f"{name}.{letter}", norm(f"{name}.norm", x)).flatten(2) for letter in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def level(stem, x):
        for block in indices(state, stem + ".block.{}.conv1"):
            x = res(f"{stem}.block.{block}", x)
            if f"{stem}.attn.{block}.q.weight" in state:
                x = attend(f"{stem}.attn.{block}", x)
        return x

    def middle(half, x):
        if lookup_free:
            for block in indices(state, half + ".mid_block.{}.conv1"):
                x = res(f"{half}.mid_block.{block}", x)
            return x
        return res(f"{half}.mid.block_2", attend(f"{half}.mid.attn_1", res(f"{half}.mid.block_1", x)))

    def adapt(index, x, z):
        flat = z.flatten(2)
        spread = (((flat - flat.mean(2, keepdim=True)) ** 2).sum(2) / (flat.shape[2] - 1) + 1e-6).sqrt()
        name = f"decoder.adaptive.{index}"
        scale = F.linear(spread, state[f"{name}.gamma.weight"], state[f"{name}.gamma.bias"])[:, :, None, None]
        offset = F.linear(flat.mean(2), state[f"{name}.beta.weight"], state[f"{name}.beta.bias"])[:, :, None, None]
        return F.group_norm(x, 32, eps=1e-6) * scale + offset

    def enlarge(stem, x):
        if not lookup_free:
            return conv(f"{stem}.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        deep, width = conv(f"{stem}.conv1", x, padding=1), x.shape[1]
        out = x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        for row, column in itertools.product(range(2), range(2)):
            block = 2 * row + column
            out[:, :, row::2, column::2] = deep[:, block * width : (block + 1) * width]
        return out

    lookup_free = "encoder.mid_block.0.conv1.weight" in state
    levels = len(indices(state, "encoder.down.{}.block.0.conv1"))
    x = conv("encoder.conv_in", image, padding=1)
    for index in range(levels):
        x = level(f"encoder.down.{index}", x)
        if index < levels - 1 and lookup_free:
            x = conv(f"encoder.down.{index}.downsample", x, stride=2, padding=1)
        elif index < levels - 1:
            x = conv(f"encoder.down.{index}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(norm("encoder.norm_out", middle("encoder", x)))
    if lookup_free:
        z = conv("encoder.conv_out", x)
        codes = sum((z[:, bit] > 0).long() * 2**bit for bit in range(z.shape[1]))
        style = quant = torch.where(z > 0, 1.0, -1.0).to(z)
        x = quant
    else:
        z, table = conv("quant_conv", conv("encoder.conv_out", x, padding=1)), state["quantize.embedding.weight"]
        codes = torch.einsum("bdhw,nd->bnhw", z, table).argmax(1)
        style, quant = None, table[codes].permute(0, 3, 1, 2)
        x = conv("post_quant_conv", quant)
    x = middle("decoder", conv("decoder.conv_in", x, padding=1))
    for index in reversed(range(levels)):
        x = level(f"decoder.up.{index}", adapt(index, x, style) if lookup_free else x)
        x = enlarge(f"decoder.up.{index}.upsample", x) if index else x
    picture = conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)), padding=1)
    return quant, codes.flatten(1), picture


def small(name, **change):
    """A small model of ours with weights that keep the size of what passes."""
    sizes = {"width": 32, "multipliers": (1, 2, 2), "blocks": 2} | change
    common = {"tokenizer.encoder." + key: value for key, value in sizes.items()} | {"tokenizer.decoder.blocks": 3}
    own = {"tokenizer.quantizer.bits": 10} if "magvit" in name else {"tokenizer.quantizer.codebook_size": 50}
    overrides = [f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in (common | own).items()]
    config = compose("tokenizer", [f"tokenizer={name}", "data.image_size=32", "loop.duration=1", *overrides])
    torch.manual_seed(0)
    model = build(config.typed.tokenizer).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn_like(value) * scale + float("norm" in key and key.endswith("weight")))
    return model


def original(name, **change):
    """Averages, beside weights that nothing should read, a discriminator and what else their files hold."""
    model = small(name, **change)
    averaged = get(TOKENIZERS[name][0]).to_theirs(model.state_dict())
    last = {key: torch.randn_like(value) if not key.startswith(EMA) else value for key, value in averaged.items()}
    return last | {"loss.discriminator.main.0.weight": torch.ones(2), f"{EMA}lossdiscriminatormain0weight": torch.ones(2)}


def averages(theirs):
    return {key: theirs[EMA + key.replace(".", "")] for key in theirs if not key.startswith((EMA, "loss."))}


@pytest.mark.parametrize(
    ("name", "change", "bare"),
    [
        ("magvit2_256", {}, False),
        ("magvit2_256", {"blocks": 3, "multipliers": (2, 1)}, True),
        ("ibq_16384", {}, False),
        ("ibq_16384", {"blocks": 4, "multipliers": (2, 1)}, True),
    ],
)
def test_answers_of_the_second_implementation(tmp_path, name, change, bare):
    theirs = original(name, **change)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    quant, codes, picture = reference(averages(theirs), image)
    assert len(codes.unique()) > 4
    tensors = {f"state.{key}": value for key, value in (averages(theirs) if bare else theirs).items()}
    tensors |= {"in.image": image, "out.quant": quant, "out.indices": codes, "out.reconstruction": picture}
    file = tmp_path / "parity.safetensors"
    config = {"image_size": 32, "ddconfig": {"ch": 32}}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"config": json.dumps(config)})
    report = run_parity(file)
    assert (report.family, report.ok, len(report.comparisons)) == (TOKENIZERS[name][0], True, 3), report


@pytest.mark.parametrize("name", ["magvit2_256", "ibq_16384"])
def test_files_convert_both_ways(tmp_path, name):
    theirs = original(name)
    torch.save({"epoch": 3, "state_dict": theirs}, tmp_path / "their.ckpt")
    report = convert_file(tmp_path / "their.ckpt", tmp_path / "model", config={"image_size": 32})
    assert (report.family, report.wrapper, report.dropped) == (TOKENIZERS[name][0], "state_dict", ["loss.*"])
    assert load_model(tmp_path / "model").layout.image_size == (32, 32)
    export_original(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == {key for key in theirs if "loss" not in key}
    assert all(torch.equal(back[key], theirs[key]) for key in back if key.startswith(EMA))
    assert all(torch.equal(back[key], value) for key, value in averages(theirs).items())


@pytest.mark.parametrize("name", ["magvit2_256", "ibq_16384"])
def test_what_is_missing_is_refused(name):
    theirs, family = original(name), get(TOKENIZERS[name][0])
    for lost in (f"{EMA}encoderconv_inweight", "decoder.up.1.block.0.norm2.bias", "decoder.conv_out.weight"):
        left = {key: value for key, value in theirs.items() if key != lost}
        with pytest.raises(UserError, match="missing "):
            load_original(family, left, {}, where="x")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ibq_16384", {"n_embed": 51}, "n_embed is 51 in the config, but 50 in the weights"),
        ("magvit2_256", {"n_embed": 2**18}, "n_embed is 262144 in the config, but 1024 in the weights"),
        (
            "magvit2_256",
            {"ddconfig": {"ch_mult": [1, 1]}},
            r"ch_mult is \[1, 1\] in the config, but \[1, 2, 2\] in the weights",
        ),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(name, config, message):
    with pytest.raises(UserError, match=message):
        load_original(get(TOKENIZERS[name][0]), original(name), config, where="x")


def test_tamings_own_tokenizers_are_not_taken_for_ibq():
    with pytest.raises(UserError, match="weights of no known family"):
        recognise(averages(original("ibq_16384")))
