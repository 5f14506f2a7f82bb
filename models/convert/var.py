"""VAR's multi-scale VQVAE (`vae_ch160v4096z32`, any width and scales): `VQVAE` of its public repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from . import cnn, taming
from .family import Family, Node, Shapes, State

_CODEBOOK, _PHI = "quantize.embedding.weight", "quantize.quant_resi."
_HITS = "quantize.ema_vocab_hit_SV"  # their statistic of codes used on each scale; its shape tells how many there are
_UNUSED = "quantizer.steps_unused"  # our count for restarting dead codes, of the same shape
_NAMES = (
    *taming.NAMES,
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
        return {*taming.BLOCKS, _CODEBOOK} <= set(shapes) and any(name == _HITS or name.startswith(_PHI) for name in shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Every size is read from the shapes; the config adds the scales (by default those for 256 pixels), α, β, dropout."""
        encoder, decoder = taming.read_half(shapes, "encoder.down"), taming.read_half(shapes, "decoder.up")
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
        ours = {taming.to_ours(name, _ONE_PHI + _NAMES, levels): value for name, value in state.items() if name != _HITS}
        if _HITS in state:
            ours[_UNUSED] = torch.zeros(state[_HITS].shape, dtype=torch.int64)
        return ours, [name for name in state if name == _HITS]

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back; their statistic starts at zero."""
        levels = cnn.levels(state, "decoder.levels")
        several = any(name.startswith("quantizer.shared_phis.1.") for name in state)
        names = _NAMES if several else _ONE_PHI + _NAMES
        theirs = {taming.to_theirs(name, names, levels): value for name, value in state.items() if name != _UNUSED}
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


def _phis(shapes: Shapes) -> tuple[bool, int]:
    """Whether the φ convolutions are shared between scales, and how many there are."""
    weights = [name for name in shapes if name.startswith(_PHI) and name.endswith(".weight")]
    return any("qresi" in name for name in weights), len(weights)


def _scales(shapes: Shapes, config: Mapping[str, Any]) -> list[int]:
    count = taming.shape(shapes, _HITS)[0]
    given = config.get("patch_nums", config.get("v_patch_nums"))
    if given is None and count != len(_PUBLISHED_SCALES):
        raise UserError(f"{count} scales of unknown size", fix="give patch_nums in the config")
    scales = list(given or _PUBLISHED_SCALES)
    if len(scales) != count:
        raise UserError(f"patch_nums has {len(scales)} scales, the weights {count}", fix="correct the config")
    return scales
