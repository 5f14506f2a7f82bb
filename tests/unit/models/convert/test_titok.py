"""TiTok's tokenizers: names, sizes, and answers of a second implementation written from its description alone."""

import re

import pytest
import torch
import torch.nn.functional as F
from published import assert_published, published, section
from safetensors.torch import save_file
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build, load_model
from tokar.models.convert.checkpoint import unwrap
from tokar.models.convert.families import get, recognise
from tokar.models.convert.family import shapes_of
from tokar.models.convert.files import convert_file, export_original
from tokar.models.convert.parity import load_original

FAMILY = get("titok")
# Millions of parameters, and tensors of the original without the buffer of clustering VQ.
SIZES = {
    "titok_s128": (83.67, 308, 128),
    "titok_b64": (204.81, 404, 64),
    "titok_l32": (641.05, 692, 32),
    "titok_bl64": (390.02, 459, 64),
    "titok_bl128": (390.18, 459, 128),
    "titok_sl256": (330.26, 411, 256),
}


def shipped(name):
    """The model that the config group option builds, on the meta device."""
    composed = compose("tokenizer", [f"tokenizer={name}", "data=imagenet256", "loop.duration=1"])
    with torch.device("meta"):
        return build(composed.plain["tokenizer"])


@pytest.mark.parametrize("name", SIZES)
def test_published_totals(name):
    total, tensors, tokens = SIZES[name]
    model = shipped(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == total
    assert len(set(FAMILY.to_theirs(model.state_dict())) - {"quantize.embed_prob"}) == tensors
    assert (model.layout.kind, model.layout.total_tokens, model.layout.image_size) == ("sequence", tokens, (256, 256))
    first = name in ("titok_s128", "titok_b64", "titok_l32")
    assert (model.layout.vocab_size, model.quantizer.dim) == ((4096, 12) if first else (8192, 64))
    assert model.quantizer.l2_normalize == model.legacy_reshape == first


@pytest.mark.parametrize("name", SIZES)
def test_shapes_alone_tell_the_config(name):
    model = shipped(name)
    with torch.device("meta"):
        again = build(FAMILY.config_from(shapes_of(FAMILY.to_theirs(model.state_dict())), {}))
    assert shapes_of(again.state_dict()) == shapes_of(model.state_dict())
    assert (again.layout, again.legacy_reshape, type(again.head)) == (model.layout, model.legacy_reshape, type(model.head))
    assert type(again.quantizer) is type(model.quantizer)
    assert again.quantizer.l2_normalize == model.quantizer.l2_normalize
    heads = [module.heads for module in model.modules() if hasattr(module, "heads")]
    assert [module.heads for module in again.modules() if hasattr(module, "heads")] == heads


def test_names_and_shapes_of_the_specification(shared_parity):
    text = (shared_parity.parent / "specs" / "tokenizers_keys.txt").read_text()
    b64 = section(text, "TiTok titok_b64")
    assert_published(shapes_of(FAMILY.to_theirs(shipped("titok_b64").state_dict())), published(b64))
    layers = [line for line in b64.splitlines() if ".transformer." in line]
    large = "\n".join(_large(line) if line.startswith("decoder.") else line for line in layers)
    expected = published(section(text, "TiTok titok_bl64_vq8k")) | published(large)
    # The listing is of the config for inference; the trainer's clustering VQ also counts how often each code is used.
    expected["quantize.embed_prob"] = {(8192,)}
    assert_published(shapes_of(FAMILY.to_theirs(shipped("titok_bl64").state_dict())), expected)


def _large(line):
    for base, large in (("{0-11}", "{0-23}"), ("x12 ", "x24 "), ("3072", "4096"), ("2304", "3072"), ("768", "1024")):
        line = line.replace(base, large)
    return line


# ---- a second implementation, in functions, from the description of the original ----


class Reference:
    """The original of a state dict: `(z, quant, indices, reconstruction)` of an image in [0, 1]; heads have 8 channels."""

    def __init__(self, state, legacy, l2):
        self.state, self.legacy, self.l2 = state, legacy, l2

    def __call__(self, image):
        tokens = self.encode(image)
        z = self.linear("encoder.conv_out", self.confuse(tokens) if self.legacy else tokens)  # [B, K, D]
        codes = self.state["quantize.embedding.weight"]
        near = z
        if self.l2:
            near, codes = (x / x.norm(dim=-1, keepdim=True) for x in (z, codes))
        found = (near[:, :, None] - codes).square().sum(-1).argmin(-1)
        quant = codes[found]
        patches = self.decode(self.linear("decoder.decoder_embed", quant))
        z, quant = (rows.movedim(-1, 1)[:, :, None] for rows in (z, quant))
        return z, quant, found, self.proxies(patches) if self.legacy else self.pixels(patches)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @staticmethod
    def confuse(tokens):
        """The legacy reading: number `w*K + k` of an image's `K*W` values is taken for channel w of token k."""
        _, count, width = tokens.shape
        confused = torch.zeros_like(tokens)
        for k in range(count):
            for w in range(width):
                place = w * count + k
                confused[:, k, w] = tokens[:, place // width, place % width]
        return confused

    def layers(self, half, patches, tokens):
        state = self.state
        first = state[f"{half}.class_embedding"].repeat(len(patches), 1, 1)
        x = torch.cat([first, patches], 1) + state[f"{half}.positional_embedding"]
        x = torch.cat([x, tokens + state[f"{half}.latent_token_positional_embedding"]], 1)
        x = self.norm(f"{half}.ln_pre", x).transpose(0, 1)
        layer = 0
        while f"{half}.transformer.{layer}.ln_1.weight" in state:
            stem = f"{half}.transformer.{layer}"
            u = self.norm(f"{stem}.ln_1", x)
            x = x + F.multi_head_attention_forward(
                u, u, u, x.shape[-1], max(x.shape[-1] // 64, 1), state[f"{stem}.attn.in_proj_weight"],
                state[f"{stem}.attn.in_proj_bias"], None, None, False, 0.0, state[f"{stem}.attn.out_proj.weight"],
                state[f"{stem}.attn.out_proj.bias"], need_weights=False,
            )[0]  # fmt: skip
            x = x + self.linear(f"{stem}.mlp.c_proj", F.gelu(self.linear(f"{stem}.mlp.c_fc", self.norm(f"{stem}.ln_2", x))))
            layer += 1
        return self.norm(f"{half}.ln_post", x.transpose(0, 1))

    def encode(self, image):
        weight = self.state["encoder.patch_embed.weight"]
        patches = F.conv2d(image, weight, self.state["encoder.patch_embed.bias"], stride=weight.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)
        tokens = self.state["latent_tokens"].repeat(len(image), 1, 1)
        return self.layers("encoder", patches, tokens)[:, 1 + patches.shape[1] :]

    def decode(self, tokens):
        count = len(self.state["decoder.positional_embedding"]) - 1
        patches = self.state["decoder.mask_token"].repeat(len(tokens), count, 1)
        out = self.layers("decoder", patches, tokens)[:, 1 : 1 + count]
        return out.unflatten(1, (int(count**0.5), -1))  # [B, h, w, W]

    def pixels(self, patches):
        values = self.linear("decoder.ffn.0", patches)
        side = int((values.shape[-1] // 3) ** 0.5)
        image = torch.zeros(len(values), 3, side * values.shape[1], side * values.shape[2])
        for channel in range(values.shape[-1]):
            row, column = channel // 3 // side, channel // 3 % side
            image[:, channel % 3, row::side, column::side] = values[..., channel]
        return F.conv2d(image, self.state["decoder.conv_out.weight"], self.state["decoder.conv_out.bias"], padding=1)

    def proxies(self, patches):
        logits = self.linear("decoder.ffn.2", torch.tanh(self.linear("decoder.ffn.0", patches)))
        shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
        h = self.conv("conv_in", (shares @ self.state["pixel_quantize.embedding.weight"]).movedim(-1, 1))
        h = self.blocks("mid", h)
        for level in reversed(
            range(sum(bool(re.fullmatch(r"pixel_decoder\.up\.\d+\.block\.0\.conv1\.weight", name)) for name in self.state))
        ):
            h = self.blocks(f"up.{level}.block", h)
            if level:
                h = self.conv(f"up.{level}.upsample_conv", h.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return self.conv("conv_out", self.swish_norm("norm_out", h))

    def conv(self, name, x):
        weight = self.state[f"pixel_decoder.{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"pixel_decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    def swish_norm(self, name, x):
        weight, bias = (self.state[f"pixel_decoder.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    def blocks(self, stem, x):
        block = 0
        while f"pixel_decoder.{stem}.{block}.conv1.weight" in self.state:
            name = f"{stem}.{block}"
            h = self.conv(f"{name}.conv1", self.swish_norm(f"{name}.norm1", x))
            h = self.conv(f"{name}.conv2", self.swish_norm(f"{name}.norm2", h))
            x = h + (self.conv(f"{name}.nin_shortcut", h) if h.shape != x.shape else x)
            block += 1
        return x


def random_original(*, first, second, tokens, grid, codebook=(50, 4), proxy=None, patch=4, frequency=False):
    """A random state dict of the original, names and all; `first`, `second`: width and layers of the halves."""
    shapes = {"latent_tokens": (tokens, first[0]), "quantize.embedding.weight": codebook}
    if frequency:
        shapes["quantize.embed_prob"] = codebook[:1]
    for half, (width, layers) in (("encoder", first), ("decoder", second)):
        shapes |= {
            f"{half}.class_embedding": (1, width), f"{half}.positional_embedding": (1 + grid**2, width),
            f"{half}.latent_token_positional_embedding": (tokens, width),
        }  # fmt: skip
        for name in ("ln_pre", "ln_post"):
            shapes |= {f"{half}.{name}.weight": (width,), f"{half}.{name}.bias": (width,)}
        for layer in range(layers):
            for name, out, into in (
                ("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width), ("mlp.c_proj.", width, 4 * width),
            ):  # fmt: skip
                stem = f"{half}.transformer.{layer}.{name}"
                shapes |= {f"{stem}weight": (out, into), f"{stem}bias": (out,)}
            for name in ("ln_1", "ln_2"):
                stem = f"{half}.transformer.{layer}.{name}"
                shapes |= {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}
    shapes |= layer_of("encoder.patch_embed", first[0], 3, patch) | layer_of("encoder.conv_out", codebook[1], first[0], 1)
    shapes |= {"decoder.decoder_embed.weight": (second[0], codebook[1]), "decoder.decoder_embed.bias": second[:1]}
    shapes["decoder.mask_token"] = (1, 1, second[0])
    if proxy is None:
        shapes |= layer_of("decoder.ffn.0", 3 * patch**2, second[0], 1) | layer_of("decoder.conv_out", 3, 3, 3)
    else:
        shapes |= layer_of("decoder.ffn.0", 2 * second[0], second[0], 1) | layer_of("decoder.ffn.2", 20, 2 * second[0], 1)
        shapes |= {"pixel_quantize.embedding.weight": (20, 6)} | pixel_decoder(proxy, 6)
    torch.manual_seed(0)
    return {name: draw(name, shape) for name, shape in shapes.items()}


def layer_of(name, out, into, side):
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def pixel_decoder(widths, z_channels):
    """Two blocks in the middle and two on each level; widths finest first."""
    shapes = layer_of("pixel_decoder.conv_in", widths[-1], z_channels, 3) | layer_of("pixel_decoder.conv_out", 3, widths[0], 3)
    shapes |= {"pixel_decoder.norm_out.weight": widths[:1], "pixel_decoder.norm_out.bias": widths[:1]}
    places = [(f"mid.{block}", widths[-1], widths[-1]) for block in range(2)]
    for level, width in enumerate(widths):
        entering = widths[min(level + 1, len(widths) - 1)]
        places += [(f"up.{level}.block.0", entering, width), (f"up.{level}.block.1", width, width)]
        if level:
            shapes |= layer_of(f"pixel_decoder.up.{level}.upsample_conv", width, width, 3)
    for place, entering, width in places:
        stem = f"pixel_decoder.{place}"
        shapes |= {f"{stem}.conv1.weight": (width, entering, 3, 3), f"{stem}.conv2.weight": (width, width, 3, 3)}
        shapes |= {f"{stem}.norm1.{kind}": (entering,) for kind in ("weight", "bias")}
        shapes |= {f"{stem}.norm2.{kind}": (width,) for kind in ("weight", "bias")}
        if entering != width:
            shapes[f"{stem}.nin_shortcut.weight"] = (width, width, 1, 1)
    return shapes


def draw(name, shape):
    """Weights that keep the size of what passes through them, so that images differ and rounding does not grow."""
    if name == "quantize.embed_prob":
        return torch.rand(shape)
    if re.search(r"(norm\w*|ln_\w+)\.weight$", name):
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith("bias"):
        return 0.1 * torch.randn(shape)
    if name.endswith("embedding.weight") or name == "latent_tokens":
        return torch.randn(shape)
    return torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


CASES = {
    "single stage": {"first": (48, 2), "second": (128, 3), "tokens": 6, "grid": 3},
    "single stage, l2": {"first": (64, 1), "second": (32, 2), "tokens": 5, "grid": 4, "patch": 2},
    "single stage, clustering": {"first": (128, 1), "second": (48, 1), "tokens": 7, "grid": 2, "frequency": True},
    "legacy": {"first": (128, 2), "second": (64, 2), "tokens": 6, "grid": 3, "proxy": (32, 32, 64)},
    "legacy, Euclidean": {"first": (32, 1), "second": (48, 2), "tokens": 9, "grid": 3, "patch": 2, "proxy": (32, 96)},
}
CONFIGS = {"single stage, l2": {"use_l2_norm": True}, "legacy, Euclidean": {"use_l2_norm": False}}


@pytest.mark.parametrize("case", CASES)
def test_answers_of_a_second_implementation(case):
    theirs, config = random_original(**CASES[case]), CONFIGS.get(case, {})
    legacy = "proxy" in CASES[case]
    model = load_original(FAMILY, theirs, config, where="x")
    assert model.legacy_reshape == legacy
    image = torch.rand(3, 3, *model.layout.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = FAMILY.answers({"state": model}, {"image": image}, config)
        z, quant, indices, reconstruction = Reference(theirs, legacy, config.get("use_l2_norm", legacy))(image)
        torch.testing.assert_close(model.encode(2 * image - 1).z_before, z, rtol=0, atol=1e-5)
    assert len(indices.unique()) > 4
    assert torch.equal(answers["indices"], indices)
    torch.testing.assert_close(answers["quant"], quant, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers["reconstruction"], reconstruction, rtol=0, atol=2e-5)


def test_the_legacy_reshape_matters():
    """The same weights read the right way answer otherwise, so that the quirk is what the test above sees."""
    theirs = random_original(**CASES["legacy"])
    model = load_original(FAMILY, theirs, {}, where="x")
    image = torch.rand(2, 3, *model.layout.image_size) * 2 - 1
    right = model.encode(image).z_before
    model.legacy_reshape = False
    assert not torch.allclose(model.encode(image).z_before, right, atol=0.1)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise(case):
    theirs = random_original(**CASES[case])
    assert recognise(theirs) is FAMILY
    ours, dropped = FAMILY.to_ours(theirs)
    assert dropped == []
    back = FAMILY.to_theirs(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_no_other_family_claims_it_nor_it_another():
    shapes = shapes_of(random_original(**CASES["legacy"]))
    for name in ("llamagen_vq", "llamagen_gpt", "gigatok_1d", "gigatok_2d", "var_vqvae"):
        assert not get(name).recognise(shapes)
    assert not FAMILY.recognise({"encoder.conv_in.weight": (8, 3, 3, 3), "quantize.embedding.weight": (4, 2)})


@pytest.mark.parametrize("case", ["single stage, clustering", "legacy"])
def test_file_to_folder_and_back(tmp_path, case):
    theirs = random_original(**CASES[case])
    torch.save({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "titok.bin")
    report = convert_file(tmp_path / "titok.bin", tmp_path / "ours")
    assert (report.family, report.dropped) == ("titok", [])
    assert load_model(tmp_path / "ours").layout.total_tokens == CASES[case]["tokens"]
    export_original(tmp_path / "ours", tmp_path / "back.pt")
    back, _ = unwrap(torch.load(tmp_path / "back.pt"))
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    save_file(theirs | {"encoder.unused": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"unexpected token_encoder\.unused"):
        convert_file(tmp_path / "more.safetensors", None)


def test_their_whole_config_is_read():
    theirs = random_original(**CASES["single stage"])
    whole = {
        "model": {"vq_model": {"use_l2_norm": True, "commitment_cost": 0.5, "num_latent_tokens": 6, "is_legacy": False}},
        "dataset": {"preprocessing": {"crop_size": 12}},
    }
    node = FAMILY.config_from(shapes_of(theirs), whole)
    assert (node["quantizer"]["l2_normalize"], node["quantizer"]["beta"], node["image_size"]) == (True, 0.5, 12)
    whole["dataset"]["preprocessing"]["crop_size"] = 256
    with pytest.raises(UserError, match="crop_size is 256 in the config, but 12 in the weights"):
        FAMILY.config_from(shapes_of(theirs), whole)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("single stage", {"num_latent_tokens": 32}, "num_latent_tokens is 32 in the config, but 6 in the weights"),
        ("single stage", {"is_legacy": True}, "is_legacy is True in the config, but False in the weights"),
        ("legacy", {"codebook_size": 4096}, "codebook_size is 4096 in the config, but 50 in the weights"),
        ("legacy", {"token_size": 12}, "token_size is 12 in the config, but 4 in the weights"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(case, change, message):
    with pytest.raises(UserError, match=message):
        load_original(FAMILY, random_original(**CASES[case]), change, where="x")


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("single stage", {"quantize.embedding.weight": None}, r"a TiTok without a codebook \(a VAE\)"),
        ("single stage", {"decoder.text_guidance_proj.weight": torch.zeros(2, 2)}, "a TA-TiTok, whose decoder reads text"),
        ("legacy", {"pixel_decoder.conv_in.weight": None}, "a TiTok of stage 1, which predicts proxy codes"),
        ("single stage", {"encoder.positional_embedding": torch.zeros(8, 48)}, "7 positions are not a square grid"),
        ("single stage", {"encoder.ln_post.weight": None}, r"missing encoder\.ln_post\.weight"),
        ("single stage", {"decoder.mask_token": None}, r"missing token_decoder\.mask_token"),
        ("legacy", {"pixel_decoder.mid.1.norm2.bias": None}, r"missing head\.cnn\.middle\.1\.norm2\.bias"),
        ("legacy", {"pixel_decoder.up.1.upsample_conv.bias": None}, r"missing head\.cnn\.upsamples\.1\.conv\.bias"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, case, change, message):
    theirs = random_original(**CASES[case]) | change
    save_file({name: value for name, value in theirs.items() if value is not None}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message) as error:
        convert_file(tmp_path / "other.safetensors", None)
    assert "\n" not in str(error.value)
