"""GigaTok's tokenizers: names, sizes, and answers of a second implementation written from its description alone."""

import itertools
import json
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
from tokar.models.convert.parity import load_original, run_parity

# Millions of parameters, without the semantic head, and tensors of the original.
SIZES = {
    "gigatok_ss": (136.07, 129.25, 538),
    "gigatok_sb": (232.40, 218.24, 646),
    "gigatok_bl": (621.64, 597.51, 970),
    "gigatok_xlxxl": (2893.97, 2842.05, 1834),
    "gigatok_ss_2d": (135.55, 128.73, 534),
    "gigatok_sb_2d": (197.13, 182.97, 534),
    "gigatok_bl_2d": (491.41, 467.28, 750),
}
SPECIFIED = ("VQ_SS256", "VQ_SB256", "VQ_BL256", "VQ_XLXXL256", "VQ_SS256_2d", "VQ_BL256_2d")


def family_of(name):
    return get("gigatok_2d" if name.endswith("2d") else "gigatok_1d")


def shipped(name, *overrides):
    """The model that the config group option builds, on the meta device."""
    composed = compose("tokenizer", [f"tokenizer={name}", "data=imagenet256", "loop.duration=1", *overrides])
    with torch.device("meta"):
        return build(composed.plain["tokenizer"])


@pytest.mark.parametrize("name", SIZES)
def test_published_totals(name):
    total, bare, tensors = SIZES[name]
    model = shipped(name)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 2) == total
    assert round(millions - sum(parameter.numel() for parameter in model.semantic.parameters()) / 1e6, 2) == bare
    theirs = family_of(name).to_theirs(model.state_dict())
    assert len(theirs) == tensors
    assert len(family_of(name).to_theirs(shipped(name, "tokenizer.semantic=null").state_dict())) == tensors - 6


@pytest.mark.parametrize("name", SIZES)
def test_shapes_alone_tell_the_config(name):
    model = shipped(name)
    family = family_of(name)
    node = family.config_from(shapes_of(family.to_theirs(model.state_dict())), {})
    with torch.device("meta"):
        again = build(node)
    assert shapes_of(again.state_dict()) == shapes_of(model.state_dict())
    assert again.layout == model.layout
    assert node["image_size"] == 256
    attentions = [module.heads for module in model.modules() if hasattr(module, "heads")]
    assert [module.heads for module in again.modules() if hasattr(module, "heads")] == attentions
    assert again.semantic.depth == model.semantic.depth == 3


@pytest.mark.parametrize("title", SPECIFIED)
def test_names_and_shapes_of_the_specification(shared_parity, title):
    text = (shared_parity.parent / "specs" / "tokenizers_keys.txt").read_text()
    halves = section(text, "GigaTok VQ_BL256 ")  # which alone has the CNN
    cnn = "\n".join(line for line in halves.splitlines() if line.startswith(("encoder.", "decoder.")))
    own = section(text, f"GigaTok {title} ")
    expected = published(cnn) | published(own)
    name = "gigatok_" + title.removeprefix("VQ_").replace("256", "").lower()
    assert_published(shapes_of(family_of(name).to_theirs(shipped(name).state_dict())), expected)


# ---- a second implementation, in functions, from the description of the original; sequences come first ----


class Reference:
    """The original of a state dict: `(quant, indices, reconstruction, inner feature)` of an image."""

    def __init__(self, state, config):
        self.state, self.config = state, config

    def __call__(self, image):
        z = self.conv("quant_conv", self.first(self.encode(image))).movedim(1, -1)
        codes = self.state["quantize.embedding.weight"]
        if self.config.get("codebook_l2_norm", True):
            z, codes = (x / x.norm(dim=-1, keepdim=True) for x in (z, codes))
        found = (z[..., None, :] - codes).square().sum(-1).argmin(-1)
        quant = codes[found].movedim(-1, 1)
        restored, feature = self.second(self.conv("post_quant_conv", quant))
        return quant, found.flatten(1), self.decode(restored), feature

    # the CNN

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def swish_norm(self, name, x):
        return F.silu(F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6))

    def res(self, name, x):
        h = self.conv(f"{name}.conv1", self.swish_norm(f"{name}.norm1", x), padding=1)
        h = self.conv(f"{name}.conv2", self.swish_norm(f"{name}.norm2", h), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def pixel_attention(self, name, x):
        h = F.group_norm(x, 32, self.state[f"{name}.norm.weight"], self.state[f"{name}.norm.bias"], 1e-6)
        q, k, v = (self.conv(f"{name}.{letter}", h).flatten(2) for letter in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def sequence(self, stem, x):
        for index in itertools.count():
            if f"{stem}.{index}.q.weight" in self.state:
                x = self.pixel_attention(f"{stem}.{index}", x)
            elif f"{stem}.{index}.conv1.weight" in self.state:
                x = self.res(f"{stem}.{index}", x)
            else:
                return x

    def level(self, stem, x):
        for index in itertools.count():
            if f"{stem}.res.{index}.conv1.weight" not in self.state:
                return x
            x = self.res(f"{stem}.res.{index}", x)
            if f"{stem}.attn.{index}.q.weight" in self.state:
                x = self.pixel_attention(f"{stem}.attn.{index}", x)

    def encode(self, image):
        h = self.conv("encoder.conv_in", image, padding=1)
        for level in range(len(self.config["encoder_ch_mult"])):
            h = self.level(f"encoder.conv_blocks.{level}", h)
            if f"encoder.conv_blocks.{level}.downsample.conv.weight" in self.state:
                h = self.conv(f"encoder.conv_blocks.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        h = self.sequence("encoder.mid", h)
        return self.conv("encoder.conv_out", self.swish_norm("encoder.norm_out", h), padding=1)

    def decode(self, z):
        h = self.sequence("decoder.mid", self.conv("decoder.conv_in", z, padding=1))
        for level in range(len(self.config["decoder_ch_mult"])):
            if f"decoder.adaptive.{level}.gamma.weight" in self.state:
                scale = self.linear(f"decoder.adaptive.{level}.gamma", (z.flatten(2).var(-1) + 1e-6).sqrt())
                bias = self.linear(f"decoder.adaptive.{level}.beta", z.flatten(2).mean(-1))
                h = scale[..., None, None] * F.group_norm(h, 32, eps=1e-6) + bias[..., None, None]
            h = self.level(f"decoder.conv_blocks.{level}", h)
            h = self.upsample(f"decoder.conv_blocks.{level}.upsample", h)
        return self.conv("decoder.conv_out", self.swish_norm("decoder.norm_out", h), padding=1)

    def upsample(self, stem, h):
        if f"{stem}.conv.weight" in self.state:
            return self.conv(f"{stem}.conv", F.interpolate(h, scale_factor=2.0), padding=1)
        if f"{stem}.conv1.weight" not in self.state:
            return h
        deep, width = self.conv(f"{stem}.conv1", h, padding=1), h.shape[1]
        out = torch.zeros(h.shape[0], width, 2 * h.shape[2], 2 * h.shape[3])
        for k in range(4 * width):
            out[:, k % width, k // (2 * width) :: 2, (k // width) % 2 :: 2] = deep[:, k]
        return out

    # the transformers

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attention(self, name, heads, query, key, value):
        if f"{name}.in_proj_weight" in self.state:
            matrices = self.state[f"{name}.in_proj_weight"].chunk(3), self.state[f"{name}.in_proj_bias"].chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), *matrices, strict=True))
            out = f"{name}.out_proj"
        else:
            q, k, v = (self.linear(f"{name}.{kind}_proj", x) for kind, x in zip("qkv", (query, key, value), strict=True))
            out = f"{name}.wo"
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        if f"{name}.q_norm.weight" in self.state:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        weights = torch.softmax(torch.einsum("lbhd,sbhd->bhls", q, k) * q.shape[-1] ** -0.5, dim=-1)
        return self.linear(out, torch.einsum("bhls,sbhd->lbhd", weights, v).flatten(2))

    def mlp(self, name, x):
        return self.linear(f"{name}.linear2", F.gelu(self.linear(f"{name}.linear1", x)))

    def cross_layer(self, name, heads, t, pq, memory):
        """`memory`: (m, pm), or None for the variant that looks at its own normalised queries twice."""
        u = self.norm(f"{name}.norm1", t)
        t = t + self.attention(f"{name}.self_attn", heads, u + pq, u + pq, u)
        u = self.norm(f"{name}.norm2", t)
        m, pm = memory or (u, pq)
        t = t + self.attention(f"{name}.multihead_attn", heads, u + pq, m + pm, m)
        return t + self.mlp(name, self.norm(f"{name}.norm3", t))

    def plain_layer(self, name, heads, t):
        u = self.norm(f"{name}.norm1", t)
        t = t + self.attention(f"{name}.self_attn", heads, u, u, u)
        return t + self.mlp(name, self.norm(f"{name}.norm2", t))

    def enter(self, prefix, role, z):
        return self.linear(f"{prefix}.{role}_embed", self.norm(f"{prefix}.ln_pre", z.flatten(2).permute(2, 0, 1)))

    def layers(self, prefix, role, t, step):
        sizes, feature = self.config[f"{role}_transformer"], None
        for index in range(sizes["layers"]):
            t = step(f"{prefix}.transformer.{index}", sizes["heads"], t)
            if index + 1 == self.config.get("distill_depth") and role == "decoder":
                feature = t
                for place in (0, 2, 4):
                    feature = self.linear(f"{prefix}.distill_mlp.{place}", F.silu(feature) if place else feature)
        return self.norm(f"{prefix}.ln_post", t), None if feature is None else feature.transpose(0, 1)

    def first(self, s):
        if "s2dencoder.ln_pre.weight" in self.state:
            return self.conv("s2dencoder.conv_out", self.grid("s2dencoder", "encoder", s)[0])
        m = self.enter("s2to1encoder", "encoder", s)
        pq, pm = (self.state[f"s2to1encoder.{name}positional_embedding"] for name in ("latent_token_", ""))
        count = pq.shape[0]
        if "s2to1encoder.query_1d" in self.state:
            t = self.state["s2to1encoder.query_1d"].repeat(1, s.shape[0], 1)
        elif self.config.get("multi_level_query_init"):
            t = self.linear("s2to1encoder.global_proj", self.pooled(m, s.shape[2:], count))
        else:
            t = self.linear("s2to1encoder.global_proj", m.mean(0, keepdim=True)).repeat(count, 1, 1)
        t, _ = self.layers("s2to1encoder", "encoder", t, lambda name, heads, t: self.cross_layer(name, heads, t, pq, (m, pm)))
        return self.conv("s2to1encoder.conv_out", t.permute(1, 2, 0)[:, :, None])

    def pooled(self, m, grid, count):
        picture, rows = m.permute(1, 2, 0).unflatten(2, grid), []
        for group in range(count.bit_length()):
            level = max(group - 1, 0)
            high, wide = grid[0] // 2 ** (level // 2), grid[1] // 2 ** ((level + 1) // 2)
            for top, left in itertools.product(range(0, grid[0], high), range(0, grid[1], wide)):
                rows.append(picture[:, :, top : top + high, left : left + wide].mean((2, 3)))
        return torch.stack(rows)

    def second(self, z):
        if "s2ddecoder.ln_pre.weight" in self.state:
            r, feature = self.grid("s2ddecoder", "decoder", z)
            return self.conv("s2ddecoder.conv_out", r, padding=1), feature
        m = self.enter("s1to2decoder", "decoder", z)
        pm, pq = (self.state[f"s1to2decoder.{name}positional_embedding"] for name in ("latent_token_", ""))
        side = int(pq.shape[0] ** 0.5)
        learned = self.state.get("s1to2decoder.q_2d")
        t = m[:1].repeat(side**2, 1, 1) if learned is None else learned.repeat(1, z.shape[0], 1)
        t, feature = self.layers(
            "s1to2decoder", "decoder", t, lambda name, heads, t: self.cross_layer(name, heads, t, pq, (m, pm))
        )
        return self.conv("s1to2decoder.conv_out", t.permute(1, 2, 0).unflatten(2, (side, side)), padding=1), feature

    def grid(self, prefix, role, z):
        t, p = self.enter(prefix, role, z), self.state[f"{prefix}.positional_embedding"]
        kind = self.config["transformer_layer_type"]
        steps = {
            "TransformerLayer": self.plain_layer,
            "TransformerDecoderLayer": lambda name, heads, t: self.cross_layer(name, heads, t, p, (t, p)),
            "QformerLayerVar": lambda name, heads, t: self.cross_layer(name, heads, t, p, None),
        }
        t, feature = self.layers(prefix, role, t + p if kind == "TransformerLayer" else t, steps[kind])
        return t.permute(1, 2, 0).unflatten(2, z.shape[2:]), feature


def random_original(family, *, cnn, common, first, second, decoder="adaptive.AdaptiveDecoder", extras=None, semantic=None):
    """A random state dict of the original, names and all, by way of our own model."""
    names = "tokar.models.tokenizers"
    classes = ("TokenEncoder", "TokenDecoder") if family.name == "gigatok_1d" else ("GridTransformer",) * 2
    node = {
        "_target_": f"{names}.gigatok.GigaTok",
        "encoder": {"_target_": f"{names}.conv.ConvEncoder", **cnn},
        "token_encoder": {"_target_": f"{names}.latent_transformers.{classes[0]}", **common, **first},
        "quantizer": {"_target_": f"{names}.quantizers.VectorQuantizer", "codebook_size": 60, "dim": 4},
        "token_decoder": {"_target_": f"{names}.latent_transformers.{classes[1]}", **common, **second},
        "decoder": {"_target_": f"{names}.{decoder}", **cnn, **(extras or {})},
        "semantic": semantic and {"_target_": f"{names}.semantic.ProjectionHead", **semantic},
        "image_size": common["image_size"],
    }
    with torch.device("meta"):
        theirs = family.to_theirs(build(node).state_dict())
    torch.manual_seed(0)
    return {name: draw(name, value.shape) for name, value in theirs.items()}


def draw(name, shape):
    """Weights that keep the size of what passes through them, so that images differ and rounding does not grow."""
    if name == "quantize.codebook_used":
        return torch.zeros(shape)
    if re.search(r"(norm\w*|ln_\w+)\.weight$", name):
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith("bias"):
        return 0.1 * torch.randn(shape)
    return torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def cnn_of(multipliers, z_channels=12, **more):
    return {"width": 32, "multipliers": multipliers, "z_channels": z_channels, "blocks": 1, "attention": False, **more}


def vit(width, layers, heads, **more):
    return {"width": width, "layers": layers, "heads": heads, **more}


def sizes(common, first, second, cnn):
    given = {f"{role}_transformer": {key: half[key] for key in ("width", "layers", "heads")} for role, half in
             (("encoder", first), ("decoder", second))}  # fmt: skip
    multipliers = {f"{half}_ch_mult": cnn["multipliers"] for half in ("encoder", "decoder")}
    return given | multipliers | {"ch": 32, "image_size": common["image_size"], "z_channels": common["z_channels"]}


def place(image_size, patch, z_channels=12, **more):
    return {"image_size": image_size, "patch": patch, "z_channels": z_channels, **more}


ROW_CASES = {
    "wide grid, many tokens": {
        "cnn": cnn_of([1, 1, 2]), "common": place(32, 4, tokens=64), "first": vit(48, 2, 3), "second": vit(32, 4, 2),
        "semantic": {"width": 32, "dim": 10, "depth": 4},
        "config": {"multi_level_query_init": True, "num_latent_tokens": 64, "distill_depth": 4},
    },
    "a grid of 6, eight tokens": {
        "cnn": cnn_of([2, 1], 8), "common": place(12, 2, 8, tokens=8), "first": vit(24, 1, 4), "second": vit(40, 1, 5),
        "config": {"multi_level_query_init": True, "codebook_l2_norm": False},
    },
    "learned queries, normalised, with pixel attention": {
        "cnn": cnn_of([1, 2], attention=True), "common": place(8, 2, tokens=6, queries="learned", qk_norm=True),
        "first": vit(32, 2, 4), "second": vit(32, 3, 2), "semantic": {"width": 32, "dim": 7, "depth": 1},
        "config": {"learnable_1d_query_init": True, "use_qk_norm": True, "distill_depth": 1},
    },
    "mean queries, plain norms, nearest upsampling": {
        "cnn": cnn_of([1, 2]), "common": place(8, 2, tokens=5), "first": vit(16, 1, 1, queries="mean"),
        "second": vit(16, 2, 2), "decoder": "conv.ConvDecoder", "config": {"num_latent_tokens": 5},
    },
}  # fmt: skip
GRID_CASES = {
    kind: {
        "cnn": cnn_of([1, 1, 2]), "common": place(20, 4, layer=layer), "first": vit(24, 2, 3, kernel=1),
        "second": vit(40, 3, 4, kernel=3), "semantic": {"width": 40, "dim": 9, "depth": 2},
        "extras": {"adaptive_norm": layer != "twin"},
        "config": {"transformer_layer_type": kind, "distill_depth": 2},
    }
    for kind, layer in (("TransformerLayer", "plain"), ("TransformerDecoderLayer", "cross"), ("QformerLayerVar", "twin"))
}  # fmt: skip


def pictures(size):
    """Six images of four blotches each, unlike enough for codes to differ."""
    random = torch.Generator().manual_seed(1)
    blotches = torch.randn(6, 3, 2, 2, generator=random) * torch.linspace(0.2, 1, 6)[:, None, None, None]
    noise = 0.2 * torch.randn(6, 3, size, size, generator=random)
    return (F.interpolate(blotches, size) + noise).clamp(-1, 1)


@pytest.mark.parametrize("case", [*ROW_CASES, *GRID_CASES])
def test_other_sizes_against_the_second_implementation(tmp_path, case):
    family = get("gigatok_1d" if case in ROW_CASES else "gigatok_2d")
    settings = dict((ROW_CASES | GRID_CASES)[case])
    config = sizes(settings["common"], settings["first"], settings["second"], settings["cnn"]) | settings.pop("config")
    state = random_original(family, **settings)
    image = pictures(config["image_size"])
    with torch.no_grad():
        answers = Reference(state, config)(image)
    names = ("quant", "indices", "reconstruction", "inner_feature")
    tensors = {f"out.{name}": answer for name, answer in zip(names, answers, strict=True) if answer is not None}
    tensors |= {"in.image": image, **{f"state.{name}": value for name, value in state.items()}}
    file = tmp_path / "parity.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"config": json.dumps(config)})
    report = run_parity(file)
    assert report.family == family.name
    assert report.ok, report
    assert {comparison.name for comparison in report.comparisons} == {name for name in names if f"out.{name}" in tensors}
    assert answers[1].unique().numel() > 3, "codes that tell nothing apart prove nothing"


@pytest.mark.parametrize("name", ["gigatok_1d", "gigatok_2d"])
def test_answers_of_the_original(shared_parity, name):
    report = run_parity(shared_parity / f"{name}.safetensors")
    assert report.family == name
    assert report.ok, report
    assert {comparison.name for comparison in report.comparisons} == {"quant", "indices", "reconstruction", "inner_feature"}


@pytest.mark.parametrize("case", [*ROW_CASES, *GRID_CASES])
def test_round_trip_is_bitwise(case):
    family = get("gigatok_1d" if case in ROW_CASES else "gigatok_2d")
    theirs = random_original(family, **{k: v for k, v in (ROW_CASES | GRID_CASES)[case].items() if k != "config"})
    assert recognise(theirs) is family
    ours, dropped = family.to_ours(theirs)
    assert dropped == ["quantize.codebook_used"]
    back = family.to_theirs(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.fixture
def original():
    """A small 1-D original with a head, and its config."""
    settings = dict(ROW_CASES["wide grid, many tokens"])
    config = sizes(settings["common"], settings["first"], settings["second"], settings["cnn"]) | settings.pop("config")
    return random_original(get("gigatok_1d"), **settings), config


def test_file_to_folder_and_back(tmp_path, original):
    theirs, config = original
    extra = {"encoder.unused": torch.zeros(1)}
    wrapped = {f"_orig_mod.module.{name}": value for name, value in theirs.items()}
    torch.save({"model": wrapped, "steps": 3}, tmp_path / "gigatok.pt")
    report = convert_file(tmp_path / "gigatok.pt", tmp_path / "ours", config=config)
    assert (report.family, report.dropped) == ("gigatok_1d", ["quantize.codebook_used"])
    assert load_model(tmp_path / "ours").semantic.depth == 4
    export_original(tmp_path / "ours", tmp_path / "back.pt")
    back, _ = unwrap(torch.load(tmp_path / "back.pt"))
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    save_file(theirs | extra, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"unexpected encoder\.unused"):
        convert_file(tmp_path / "more.safetensors", None, config=config)


def test_the_head_may_be_gone_and_a_head_on_the_cnn_is_dropped(original):
    theirs, config = original
    bare = {name: value for name, value in theirs.items() if ".distill_mlp." not in name}
    model = load_original(get("gigatok_1d"), bare, config, where="x")
    assert model.semantic is None
    ours, dropped = get("gigatok_1d").to_ours(bare | {"distill_mlp.0.weight": torch.zeros(1)})
    assert dropped == ["quantize.codebook_used", "distill_mlp.0.weight"]
    assert set(ours) == set(model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, "image_size is 64 in the config, but 32 in the weights"),
        ({"num_latent_tokens": 32}, "num_latent_tokens is 32 in the config, but 64 in the weights"),
        ({"encoder_transformer": {"width": 64}}, "width is 64 in the config, but 48 in the weights"),
        ({"encoder_transformer": {}}, r"0 heads do not fit a width of 48; give encoder_transformer\.heads"),
        ({"out_inner_dim": 768}, "out_inner_dim is 768 in the config, but 10 in the weights"),
        ({"decoder_ch_mult": [1, 2]}, r"decoder_ch_mult is \[1, 2\] in the config"),
        ({"distill_depth": 9}, r"semantic\.depth is 9, but token_decoder has 4 layers"),
        ({"multi_level_2d_query_init": True}, "multi_level_2d_query_init is deprecated"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(original, change, message):
    with pytest.raises(UserError, match=message):
        load_original(get("gigatok_1d"), original[0], original[1] | change, where="x")


@pytest.mark.parametrize(
    "name",
    [
        "s2to1encoder.positional_embedding", "s1to2decoder.ln_post.weight", "s1to2decoder.transformer.2.norm2.bias",
        "s2to1encoder.latent_token_positional_embedding", "decoder.adaptive.0.beta.bias", "s1to2decoder.distill_mlp.2.bias",
    ],
)  # fmt: skip
def test_a_missing_tensor_is_refused_by_name(original, name):
    theirs, config = original
    del theirs[name]
    with pytest.raises(UserError, match=r"missing ") as error:
        load_original(get("gigatok_1d"), theirs, config, where="x")
    assert "\n" not in str(error.value)


def test_layers_of_another_type_are_refused():
    settings = dict(GRID_CASES["TransformerLayer"])
    config = sizes(settings["common"], settings["first"], settings["second"], settings["cnn"]) | settings.pop("config")
    theirs = random_original(get("gigatok_2d"), **settings)
    with pytest.raises(UserError, match="transformer_layer_type QformerLayerVar does not fit the weights"):
        load_original(get("gigatok_2d"), theirs, config | {"transformer_layer_type": "QformerLayerVar"}, where="x")
