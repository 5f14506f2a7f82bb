"""TiTok's tokenizers of any size: `TiTok` of the public 1d-tokenizer repository, as its checkpoints and hub folders name it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from . import cnn
from .family import Family, Node, Shapes, State

_CODEBOOK, _FREQUENCY = "quantize.embedding.weight", "quantize.embed_prob"
_OURS_FREQUENCY, _UNUSED = "quantizer.frequency", "quantizer.steps_unused"
_PROXY, _LEVELS, _UPSAMPLES = "decoder.ffn.2.weight", "head.cnn.levels.", "head.cnn.upsamples."
# Theirs, ours, as pairs that `cnn.swap` reads in either direction; `#` stands for a number.
_NAMES = (
    ("pixel_decoder.up.#.block.#.", _LEVELS + "#.#."),
    ("pixel_decoder.up.#.upsample_conv.", _UPSAMPLES + "#.conv."),
    ("pixel_decoder.mid.#.", "head.cnn.middle.#."),
    ("pixel_decoder.", "head.cnn."),
    (".nin_shortcut.", ".shortcut."),
    ("pixel_quantize.embedding.weight", "head.codebook"),
    (_CODEBOOK, "quantizer.codebook"),
    (_FREQUENCY, _OURS_FREQUENCY),
    ("latent_tokens", "token_encoder.queries"),
    ("encoder.conv_out.", "quant_conv."),
    ("decoder.decoder_embed.", "post_quant."),
    ("decoder.ffn.0.", "head.conv_in."),
    ("decoder.ffn.2.", "head.conv_logits."),
    ("decoder.conv_out.", "head.conv_out."),
    ("encoder.ln_post.", "token_encoder.norm_out."),
    ("decoder.ln_post.", "token_decoder.norm_out."),
    ("encoder.", "token_encoder."),
    ("decoder.", "token_decoder."),
    (".transformer.#.ln_1.", ".layers.#.norm1."),
    (".transformer.#.ln_2.", ".layers.#.norm2."),
    (".transformer.#.attn.in_proj_weight", ".layers.#.self_attention.weight"),
    (".transformer.#.attn.in_proj_bias", ".layers.#.self_attention.bias"),
    (".transformer.#.attn.out_proj.", ".layers.#.self_attention.out."),
    (".transformer.#.mlp.c_fc.", ".layers.#.mlp.0."),
    (".transformer.#.mlp.c_proj.", ".layers.#.mlp.2."),
    (".ln_pre.", ".norm_in."),
    (".latent_token_positional_embedding", ".token_positions"),
    (".positional_embedding", ".positions"),
)
_HEAD_DIM = 64  # of every published size


class TiTok(Family):
    """`TiTok` with a codebook: our `TiTok`; the first weights (S-128, B-64, L-32) with their proxy codes and pixel decoder."""

    name = "titok"

    def recognise(self, shapes: Shapes) -> bool:
        """By the latent tokens and both halves' positions of them."""
        halves = {f"{half}.latent_token_positional_embedding" for half in ("encoder", "decoder")}
        return {"latent_tokens", *halves} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Sizes from the shapes; the head tells whether the weights are legacy ones, and so l2 normalisation and the reshape.

        The quantizer clusters where the weights hold its count of use, as the trainer's do and those for inference do not.

        Args:
            shapes: of the original state.
            config: theirs, whole or its `vq_model` alone. It adds β and `use_l2_norm`.

        Raises:
            UserError: no codebook, a decoder that needs text or proxy codes from elsewhere, or a contradiction.
        """
        _refuse_others(shapes)
        settings = _settings(config)
        legacy = _PROXY in shapes
        patch = _shape(shapes, "encoder.patch_embed.weight")[-1]
        size = _image_size(shapes, patch)
        tokens = shapes["latent_tokens"][0]
        cnn.check_against(settings, {"num_latent_tokens": tokens, "is_legacy": legacy, "crop_size": size})
        common = {"tokens": tokens, "image_size": size, "patch": patch}
        return {
            "_target_": f"{cnn.MODELS}.titok.TiTok",
            "token_encoder": {"_target_": f"{cnn.MODELS}.titok.PatchEncoder", **_sizes(shapes, "encoder"), **common},
            "quantizer": _quantizer(shapes, settings, legacy),
            "token_decoder": {"_target_": f"{cnn.MODELS}.titok.PatchDecoder", **_sizes(shapes, "decoder"), **common},
            "head": _proxy_head(shapes) if legacy else _pixel_head(shapes, patch),
            "image_size": size,
            "legacy_reshape": legacy,
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, drop the mask token's outer axis, add our count of unused steps."""
        levels = cnn.levels(state, "pixel_decoder.up")
        ours = {_mirror(cnn.swap(name, _NAMES), levels): value for name, value in state.items()}
        if "token_decoder.mask_token" in ours:
            ours["token_decoder.mask_token"] = ours["token_decoder.mask_token"].flatten(0, 1)
        if _CODEBOOK in state:
            ours[_UNUSED] = torch.zeros(state[_CODEBOOK].shape[0], dtype=torch.int64)
        return ours, []

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, give the mask token its outer axis."""
        levels = cnn.levels(state, _LEVELS.rstrip("."))
        back = [(ours, theirs) for theirs, ours in _NAMES]
        theirs = {cnn.swap(_mirror(name, levels), back): value for name, value in state.items() if name != _UNUSED}
        theirs["decoder.mask_token"] = theirs["decoder.mask_token"].unsqueeze(0)
        return theirs

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`quant [B, D, 1, K]`, `indices [B, K]` and `reconstruction [B, 3, H, W]` of `image`, both images in [0, 1]."""
        output = models["state"](2 * inputs["image"] - 1)
        return {"quant": output.z_quantized, "indices": output.codes, "reconstruction": (output.reconstruction + 1) / 2}


def _refuse_others(shapes: Shapes) -> None:
    if "decoder.text_guidance_proj.weight" in shapes:
        raise UserError("a TA-TiTok, whose decoder reads text as well", fix="convert a TiTok without text")
    if _CODEBOOK not in shapes:
        raise UserError("a TiTok without a codebook (a VAE), which has no tokens", fix="convert one of the VQ models")
    if _PROXY in shapes and "pixel_decoder.conv_in.weight" not in shapes:
        raise UserError(
            "a TiTok of stage 1, which predicts proxy codes but has no decoder for them",
            fix="convert the weights of stage 2, which hold it",
        )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their `vq_model` node, with the image size beside it."""
    model, dataset = config.get("model", {}), config.get("dataset", {})
    return {**model.get("vq_model", config), **{k: v for k, v in dataset.get("preprocessing", {}).items() if k == "crop_size"}}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"missing {name}", fix="the file is incomplete: copy it again")
    return shapes[name]


def _image_size(shapes: Shapes, patch: int) -> int:
    patches = _shape(shapes, "encoder.positional_embedding")[0] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(f"{patches} positions are not a square grid", fix="give weights for square images")
    return side * patch


def _sizes(shapes: Shapes, half: str) -> Node:
    width = _shape(shapes, f"{half}.ln_post.weight")[0]
    heads = max(width // _HEAD_DIM, 1)
    return {"width": width, "layers": cnn.levels(shapes, f"{half}.transformer"), "heads": heads}


def _quantizer(shapes: Shapes, settings: Mapping[str, Any], legacy: bool) -> Node:
    codebook_size, dim = shapes[_CODEBOOK]
    cnn.check_against(settings, {"codebook_size": codebook_size, "token_size": dim})
    clustering = _FREQUENCY in shapes
    return {
        "_target_": f"{cnn.MODELS}.quantizers.{'ClusteringVectorQuantizer' if clustering else 'VectorQuantizer'}",
        "codebook_size": codebook_size,
        "dim": dim,
        "beta": settings.get("commitment_cost", 0.25),
        "l2_normalize": settings.get("use_l2_norm", legacy),
    }


def _pixel_head(shapes: Shapes, patch: int) -> Node:
    width = _shape(shapes, "decoder.ffn.0.weight")[1]
    return {"_target_": f"{cnn.MODELS}.titok.PixelHead", "width": width, "patch": patch}


def _proxy_head(shapes: Shapes) -> Node:
    codebook_size, z_channels = _shape(shapes, "pixel_quantize.embedding.weight")
    levels = range(cnn.levels(shapes, "pixel_decoder.up"))
    widths = [_shape(shapes, f"pixel_decoder.up.{level}.block.0.conv2.weight")[0] for level in levels]
    decoder = {
        "_target_": f"{cnn.MODELS}.maskgit.MaskGITDecoder",
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": cnn.levels(shapes, "pixel_decoder.up.0.block"),
        "z_channels": z_channels,
    }
    width = _shape(shapes, "decoder.ffn.0.weight")[1]
    return {"_target_": f"{cnn.MODELS}.titok.ProxyHead", "decoder": decoder, "width": width, "codebook_size": codebook_size}


def _mirror(name: str, levels: int) -> str:
    """Their pixel decoder counts levels from the finest, ours in the order they run."""
    return cnn.mirror(cnn.mirror(name, _LEVELS, levels), _UPSAMPLES, levels)
