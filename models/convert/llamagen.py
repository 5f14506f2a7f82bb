"""LlamaGen's VQ tokenizers (VQ-16, VQ-8, any width): `VQModel` of its public repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .family import Family, Node, Shapes, State

# Ours on the right. Only attention differs in more than its name: they keep q, k, v apart, we keep one matrix.
_RENAMES = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.blocks."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attentions."),
    (r"\.conv_blocks\.(\d+)\.(?:down|up)sample\.", r".levels.\1.resample."),
    (r"\.mid\.", ".middle."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
)
_RENAMES_BACK = (
    (r"\.levels\.(\d+)\.blocks\.", r".conv_blocks.\1.res."),
    (r"\.levels\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.conv_blocks.\1.downsample."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.conv_blocks.\1.upsample."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
)
_USED, _USED_LENGTH = "quantize.codebook_used", 65536  # their sliding window of last indices, a statistic
_UNUSED = "quantizer.steps_unused"  # our count for restarting dead codes
_MODELS = "tokar.models.tokenizers"


class LlamaGenVQ(Family):
    """`VQModel`: our `VQGAN` of `ConvEncoder`, `ConvDecoder` and `VectorQuantizer`."""

    name = "llamagen_vq"

    def recognise(self, shapes: Shapes) -> bool:
        """By the block names, the codebook, and the absence of GigaTok's transformers."""
        needed = {f"{half}.{name}.weight" for half in ("encoder", "decoder") for name in ("conv_in", "conv_out")}
        needed |= {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}
        foreign = ("s2to1encoder.", "s2dencoder.", "decoder.adaptive.")
        return needed <= set(shapes) and len(shapes.get("quant_conv.weight", ())) == 4 and not _any_starts(shapes, foreign)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Every size is read from the shapes; the config adds l2 normalisation, β, dropout and `image_size`."""
        width = shapes["encoder.conv_in.weight"][0]
        encoder, decoder = _read_half(shapes, "encoder", width), _read_half(shapes, "decoder", width)
        codebook_size, dim = shapes["quantize.embedding.weight"]
        _check_against(config, encoder, decoder, codebook_size, dim)
        dropout = {"dropout": config.get("dropout_p", 0.0)}
        quantizer = {
            "codebook_size": codebook_size,
            "dim": dim,
            "beta": config.get("commit_loss_beta", 0.25),
            "l2_normalize": config.get("codebook_l2_norm", True),
            "entropy_weight": config.get("entropy_loss_ratio", 0.0),
        }
        return {
            "_target_": f"{_MODELS}.vqgan.VQGAN",
            "encoder": {"_target_": f"{_MODELS}.conv.ConvEncoder", **encoder, **dropout},
            "decoder": {"_target_": f"{_MODELS}.conv.ConvDecoder", **decoder, **dropout},
            "quantizer": {"_target_": f"{_MODELS}.quantizers.VectorQuantizer", **quantizer},
            "image_size": config.get("image_size", 256),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, join q, k, v, drop the usage window, add our count of unused steps."""
        merged = {name: value for name, value in state.items() if name != _USED}
        for stem in [name.removesuffix("q.weight") for name in state if name.endswith(".q.weight")]:
            for kind in ("weight", "bias"):
                parts = [f"{stem}{letter}.{kind}" for letter in "qkv"]
                if all(part in merged for part in parts):  # else the strict load names what is missing
                    merged[f"{stem}qkv.{kind}"] = torch.cat([merged.pop(part) for part in parts])
        ours = {_rename(name, _RENAMES): value for name, value in merged.items()}
        ours[_UNUSED] = torch.zeros(state["quantize.embedding.weight"].shape[0], dtype=torch.int64)
        return ours, [name for name in state if name == _USED]

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, part q, k, v, add an empty usage window."""
        theirs: State = {_USED: torch.zeros(_USED_LENGTH)}
        for ours, value in state.items():
            if ours == _UNUSED:
                continue
            name = _rename(ours, _RENAMES_BACK)
            stem, _, kind = name.rpartition(".qkv.")
            if stem:
                theirs |= {f"{stem}.{letter}.{kind}": part.clone() for letter, part in zip("qkv", value.chunk(3), strict=True)}
            else:
                theirs[name] = value
        return theirs

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`quant [B, D, h, w]`, `indices [B, N]` and `reconstruction [B, 3, H, W]` of `image`."""
        output = models["state"](inputs["image"])
        return {"quant": output.z_quantized, "indices": output.codes, "reconstruction": output.reconstruction}


def _any_starts(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _read_half(shapes: Shapes, half: str, width: int) -> dict[str, Any]:
    """Constructor arguments of our encoder or decoder from the shapes of theirs."""
    widths: dict[int, int] = {}
    blocks = 0
    for name, shape in shapes.items():
        if found := re.match(rf"{half}\.conv_blocks\.(\d+)\.res\.(\d+)\.conv1\.weight", name):
            widths[int(found[1])] = shape[0]
            blocks = max(blocks, int(found[2]) + 1)
    finest_first = sorted(widths, reverse=half == "decoder")
    multipliers = [widths[level] // width for level in finest_first]
    z_channels = shapes["encoder.conv_out.weight"][0] if half == "encoder" else shapes["decoder.conv_in.weight"][1]
    return {
        "width": width,
        "multipliers": multipliers,
        "blocks": blocks,
        "z_channels": z_channels,
        "attention": _any_starts(shapes, (f"{half}.mid.1.q.",)),
    }


def _check_against(config: Mapping[str, Any], encoder: Node, decoder: Node, codebook_size: int, dim: int) -> None:
    found = {
        "codebook_size": codebook_size,
        "codebook_embed_dim": dim,
        "encoder_ch_mult": encoder["multipliers"],
        "decoder_ch_mult": decoder["multipliers"],
        "z_channels": encoder["z_channels"],
        "ch": encoder["width"],
    }
    for key, value in found.items():
        given = config.get(key, value)
        if (list(given) if isinstance(given, list | tuple) else given) != value:
            raise UserError(f"{key} is {given} in the config, but {value} in the weights", fix="correct the config")
