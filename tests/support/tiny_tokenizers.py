"""Every kind of tokenizer, tiny and with random weights, for images of 32 pixels; composed as a user would."""

import torch

WIDTH = ["encoder.width=32", "encoder.multipliers=[1,1,1,1]", "encoder.z_channels=32", "encoder.blocks=1", "decoder.blocks=1"]
CODES = ["quantizer.codebook_size=16", "quantizer.dim=4"]
VIT = [f"{part}.{size}" for part in ("token_encoder", "token_decoder") for size in ("width=16", "layers=2", "heads=2")]
LEVELS = [f"quantizer.levels.level{k}.{size}" for k in range(4) for size in ("codebook_size=16", "dim=4")]
KINDS = {
    "vqgan": ("tokenizer=vqgan", [*WIDTH, *CODES]),
    "residual": ("tokenizer=vqgan", [*WIDTH, *LEVELS]),
    "multiscale": ("tokenizer=multiscale_small", [*WIDTH, *CODES, "quantizer.scales=[1,2,4]"]),
    "flexvar": ("tokenizer=flexvar_small", [*WIDTH, *CODES, "scales=[2,4]", "drawn_scales=0"]),
    "gigatok": (
        "tokenizer=gigatok",
        ["encoder.width=32", "encoder.multipliers=[1,1,1,1]", "encoder.z_channels=32", "encoder.blocks=1", "decoder.blocks=1",
         *VIT, *CODES, "token_encoder.tokens=16", "token_encoder.patch=8", "token_decoder.tokens=16", "token_decoder.patch=8",
         "semantic.depth=1"],
    ),
    "titok": (
        "tokenizer=titok",
        [*VIT, *CODES, "token_encoder.tokens=16", "token_encoder.patch=8", "token_decoder.tokens=16", "token_decoder.patch=8"],
    ),
}  # fmt: skip


def tiny_node(kind):
    from tokar.conf.compose import compose

    group, keys = KINDS[kind]
    quantizer = ["tokenizer/quantizer=residual"] if kind == "residual" else []
    overrides = [group, *quantizer, "loop.duration=1", "data=digits", *(f"tokenizer.{key}" for key in keys)]
    return compose("tokenizer", overrides).plain["tokenizer"]


def tiny(kind, seed=0):
    from tokar.models.build import build

    torch.manual_seed(seed)
    return build(tiny_node(kind)).eval()
