"""VAR's multi-scale VQVAE (`vae_ch160v4096z32`, any width and scales): `VQVAE` of its public repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from . import cnn
from .family import Family, Node, Shapes, State

_CODEBOOK, _PHI = "quantize.embedding.weight", "quantize.quant_resi."
_HITS = "quantize.ema_vocab_hit_SV"  # their statistic of codes used on each scale; its shape tells how many there are
_UNUSED = "quantizer.steps_unused"  # our count for restarting dead codes, of the same shape
# Theirs, ours, as pairs that `cnn.swap` reads in either direction; `#` stands for a number.
_NAMES = (
    ("encoder.down.#.block.#.", "encoder.levels.#.blocks.#."),
    ("encoder.down.#.attn.#.", "encoder.levels.#.attentions.#."),
    ("encoder.down.#.downsample.", "encoder.levels.#.resample."),
    ("decoder.up.#.block.#.", "decoder.levels.#.blocks.#."),
    ("decoder.up.#.attn.#.", "decoder.levels.#.attentions.#."),
    ("decoder.up.#.upsample.", "decoder.levels.#.resample."),
    (".mid.block_1.", ".middle.0."),
    (".mid.attn_1.", ".middle.1."),
    (".mid.block_2.", ".middle.2."),
    (".nin_shortcut.", ".shortcut."),
    (".proj_out.", ".out."),
    (_PHI + "qresi_ls.#.", "quantizer.shared_phis.#."),
    (_PHI + "#.", "quantizer.scale_phis.#."),
    (_CODEBOOK, "quantizer.codebook"),
)
# A single φ for all scales has no number.
_ONE_PHI = ((_PHI + "qresi.", "quantizer.shared_phis.0."),)
_PUBLISHED_SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


class VARVQVAE(Family):
    """`VQVAE`: our `MultiScaleVQ` of `ConvEncoder`, `ConvDecoder` and `MultiScaleQuantizer`."""

    name = "var_vqvae"
    parts = ("vqvae",)

    def recognise(self, shapes: Shapes) -> bool:
        """By taming's block names, the codebook, and the φ convolutions or the count of hits on each scale."""
        needed = {"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight", _CODEBOOK}
        return needed <= set(shapes) and any(name == _HITS or name.startswith(_PHI) for name in shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Every size is read from the shapes; the config adds the scales (by default those for 256 pixels), α, β, dropout."""
        encoder, decoder = _read_half(shapes, "encoder.down"), _read_half(shapes, "decoder.up")
        codebook_size, dim = shapes[_CODEBOOK]
        shared, count = _phis(shapes)
        found = {"ch": encoder["width"], "z_channels": encoder["z_channels"], "vocab_size": codebook_size}
        cnn.check_against(config, {**found, "ch_mult": encoder["multipliers"]})
        dropout = {"dropout": config.get("dropout", 0.0)}
        quantizer = {
            "codebook_size": codebook_size,
            "dim": dim,
            "scales": _scales(shapes, config),
            "beta": config.get("beta", 0.25),
            "normalize_search": config.get("using_znorm", False),
            "share_phi": count if shared else 0,
            "phi_ratio": abs(config.get("quant_resi", 0.5)) if count else 0.0,
        }
        return {
            "_target_": f"{cnn.MODELS}.multiscale.MultiScaleVQ",
            "encoder": {"_target_": f"{cnn.MODELS}.conv.ConvEncoder", **encoder, **dropout},
            "decoder": {"_target_": f"{cnn.MODELS}.conv.ConvDecoder", **decoder, **dropout},
            "quantizer": {"_target_": f"{cnn.MODELS}.multiscale_quantizer.MultiScaleQuantizer", **quantizer},
            "kernel": shapes["quant_conv.weight"][-1] if "quant_conv.weight" in shapes else 3,
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, drop their statistic, add our count of unused steps."""
        levels = cnn.levels(state, "decoder.up")
        ours = {_theirs_to_ours(name, levels): value for name, value in state.items() if name != _HITS}
        if _HITS in state:
            ours[_UNUSED] = torch.zeros(state[_HITS].shape, dtype=torch.int64)
        return ours, [name for name in state if name == _HITS]

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back; their statistic starts at zero."""
        levels = cnn.levels(state, "decoder.levels")
        one_phi = not any(name.startswith("quantizer.shared_phis.1.") for name in state)
        theirs = {_ours_to_theirs(name, levels, one_phi): value for name, value in state.items() if name != _UNUSED}
        return {**theirs, _HITS: torch.zeros(state[_UNUSED].shape)}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`indices [B, N]`, `teacher_forcing_input [B, N − n₀, D]` and `reconstruction [B, 3, H, W]`, clamped, of `image`."""
        (model,) = models.values()
        if "image" not in inputs:
            return {}
        output = model(inputs["image"])
        teacher_inputs: Any = model.teacher_inputs
        return {
            "indices": output.codes,
            "teacher_forcing_input": teacher_inputs(output.codes),
            "reconstruction": output.reconstruction.clamp(-1, 1),
        }


def _theirs_to_ours(name: str, levels: int) -> str:
    """Their decoder counts levels from the finest, ours in the order they run."""
    return cnn.mirror(cnn.swap(name, _ONE_PHI + _NAMES), "decoder.levels.", levels)


def _ours_to_theirs(name: str, levels: int, one_phi: bool) -> str:
    table = (_ONE_PHI if one_phi else ()) + _NAMES
    return cnn.swap(cnn.mirror(name, "decoder.levels.", levels), [(ours, theirs) for theirs, ours in table])


def _read_half(shapes: Shapes, stem: str) -> dict[str, Any]:
    """Constructor arguments of our encoder or decoder from the shapes of theirs (`encoder.down` or `decoder.up`)."""
    half = stem.partition(".")[0]
    widths: dict[int, int] = {}
    blocks = 0
    for name, shape in shapes.items():
        if found := re.fullmatch(rf"{re.escape(stem)}\.(\d+)\.block\.(\d+)\.conv1\.weight", name):
            widths[int(found[1])] = shape[0]
            blocks = max(blocks, int(found[2]) + 1)
    inner, outer = _shape(shapes, f"{half}.conv_in.weight"), _shape(shapes, f"{half}.conv_out.weight")
    width, z_channels = (inner[0], outer[0]) if half == "encoder" else (outer[1], inner[1])
    return {
        "width": width,
        "multipliers": [widths[level] // width for level in sorted(widths)],
        "blocks": blocks,
        "z_channels": z_channels,
        "attention": f"{half}.mid.attn_1.qkv.weight" in shapes,
    }


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"missing {name}", fix="the file is incomplete: copy it again")
    return shapes[name]


def _phis(shapes: Shapes) -> tuple[bool, int]:
    """Whether the φ convolutions are shared between scales, and how many there are."""
    weights = [name for name in shapes if name.startswith(_PHI) and name.endswith(".weight")]
    return any("qresi" in name for name in weights), len(weights)


def _scales(shapes: Shapes, config: Mapping[str, Any]) -> list[int]:
    count = _shape(shapes, _HITS)[0]
    given = config.get("patch_nums", config.get("v_patch_nums"))
    if given is None and count != len(_PUBLISHED_SCALES):
        raise UserError(f"{count} scales of unknown size", fix="give patch_nums in the config")
    scales = list(given or _PUBLISHED_SCALES)
    if len(scales) != count:
        raise UserError(f"patch_nums has {len(scales)} scales, the weights {count}", fix="correct the config")
    return scales
