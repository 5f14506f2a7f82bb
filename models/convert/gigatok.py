"""GigaTok's tokenizers of any size: `VQVitModelPlus` (1-D) and `VQVitModel2DPlus` (2-D) of its public repository."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from . import cnn
from .family import Family, Node, Shapes, State

# Theirs, ours. Prefixes of the transformers and the semantic head are each class's own.
_RENAMES = (
    (r"\.transformer\.(\d+)\.", r".layers.\1."),
    (r"\.in_proj_(weight|bias)$", r".\1"),
    (r"\.out_proj\.|\.wo\.", ".out."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.multihead_attn\.", ".cross_attention."),
    (r"\.linear1\.", ".mlp.0."),
    (r"\.linear2\.", ".mlp.2."),
    (r"\.(?:en|de)coder_embed\.", ".embed."),
    (r"\.ln_pre\.", ".norm_in."),
    (r"\.ln_post\.", ".norm_out."),
    (r"\.latent_token_positional_embedding$", ".token_positions"),
    (r"\.positional_embedding$", ".positions"),
    (r"\.(?:query_1d|q_2d)$", ".queries"),
    (r"\.global_proj\.", ".query_proj."),
    (r"\.resample\.conv1\.", ".resample.conv."),
)
_RENAMES_BACK = (
    (r"\.layers\.(\d+)\.", r".transformer.\1."),
    (r"_attention\.(weight|bias)$", r"_attention.in_proj_\1"),
    (r"\.norm_([qk])\.", r".\1_norm."),
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"_attn\.out\.", "_attn.out_proj."),
    (r"\.transformer\.(\d+)\.mlp\.0\.", r".transformer.\1.linear1."),
    (r"\.transformer\.(\d+)\.mlp\.2\.", r".transformer.\1.linear2."),
    (r"^token_(en|de)coder\.embed\.", r"token_\1coder.\1coder_embed."),
    (r"\.norm_in\.", ".ln_pre."),
    (r"^(token_.*)\.norm_out\.", r"\1.ln_post."),
    (r"\.token_positions$", ".latent_token_positional_embedding"),
    (r"\.positions$", ".positional_embedding"),
    (r"^token_encoder\.queries$", "token_encoder.query_1d"),
    (r"^token_decoder\.queries$", "token_decoder.q_2d"),
    (r"\.query_proj\.", ".global_proj."),
)
_TABLE = re.compile(r"\.(?:\w*positional_embedding|query_1d|q_2d)$")  # [N, 1, W] with them, [N, W] with us
_APART = re.compile(r"(.*_attn\.)q_proj\.(weight|bias)$")  # their own attention, for normalised queries and keys
_HEAD_DIM, _DISTILL_DEPTH = 64, 3  # of every published size


class GigaTokFamily(Family):
    """What 1-D and 2-D have in common.

    Attributes:
        prefixes: their names of the two transformers.
    """

    prefixes: tuple[str, str]

    def recognise(self, shapes: Shapes) -> bool:
        """By the convolutional halves and the prefix of the first transformer."""
        return cnn.recognise(shapes) and cnn.any_starts(shapes, (f"{self.prefixes[0]}.",))

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Sizes from the shapes; heads, the kinds of queries and layers, and the depth of the head from the config.

        Without a config: heads of width 64, pooled queries, the head after layer 3, as in every published model.
        """
        encoder, decoder = (cnn.read_half(shapes, half, config) for half in ("encoder", "decoder"))
        patch = 2 ** (len(encoder["multipliers"]) - 1)
        image_size = self._image_size(shapes, config, patch)
        common = {"z_channels": encoder["z_channels"], "image_size": image_size, "patch": patch}
        return {
            "_target_": f"{cnn.MODELS}.gigatok.GigaTok",
            "encoder": {"_target_": f"{cnn.MODELS}.conv.ConvEncoder", **encoder},
            "token_encoder": self._transformer(shapes, config, 0) | common,
            "quantizer": cnn.read_quantizer(shapes, config),
            "token_decoder": self._transformer(shapes, config, 1) | common,
            "decoder": _decoder_class(shapes) | decoder,
            "semantic": self._semantic(shapes, config),
            "image_size": image_size,
            "feature_weight": config.get("fea_rec_loss_weight", 1.0),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, flatten the position tables, join q, k, v; the usage window and a head on the CNN have no place."""
        dropped = [name for name in state if name == cnn.USED or name.startswith("distill_mlp.")]
        kept = {name: value for name, value in state.items() if name not in dropped}
        for name in [name for name in kept if _APART.match(name)]:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            if all(part in kept for part in parts):  # else the strict load names what is missing
                kept[name.replace("q_proj.", "in_proj_")] = torch.cat([kept.pop(part) for part in parts])
        flat = {name: value.squeeze(1) if _TABLE.search(name) else value for name, value in kept.items()}
        first, second = (re.escape(prefix) for prefix in self.prefixes)
        prefixes = (
            (rf"^{second}\.distill_mlp\.", "semantic.mlp."),
            (rf"^{first}\.", "token_encoder."),
            (rf"^{second}\.", "token_decoder."),
        )
        return cnn.to_ours(flat, (*cnn.RENAMES, *_RENAMES, *prefixes)), dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, give the position tables their middle axis, part q, k, v; add an empty usage window."""
        upsampling = "conv1" if _spreads(state) else "conv"
        prefixes = (
            (r"^(decoder\.conv_blocks\.\d+\.upsample)\.conv\.", rf"\1.{upsampling}."),
            (r"^semantic\.mlp\.", f"{self.prefixes[1]}.distill_mlp."),
            (r"^token_encoder\.", f"{self.prefixes[0]}."),
            (r"^token_decoder\.", f"{self.prefixes[1]}."),
        )
        theirs = cnn.to_theirs(state, (*cnn.RENAMES_BACK, *_RENAMES_BACK, *prefixes))
        theirs = {name: value.unsqueeze(1) if _TABLE.search(name) else value for name, value in theirs.items()}
        for stem in [name.removesuffix("q_norm.weight") for name in theirs if name.endswith("q_norm.weight")]:
            _take_apart(theirs, stem)
        return theirs

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`quant`, `indices [B, N]`, `reconstruction [B, 3, H, W]` and, with a head, `inner_feature [B, P, C]` of `image`."""
        output = models["state"](inputs["image"])
        answers = {"quant": output.z_quantized, "indices": output.codes, "reconstruction": output.reconstruction}
        return answers if output.semantic is None else answers | {"inner_feature": output.semantic}

    def _image_size(self, shapes: Shapes, config: Mapping[str, Any], patch: int) -> int:
        patches = _shape(shapes, f"{self.prefixes[0]}.positional_embedding")[0]
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(f"{patches} positions are not a square grid", fix="give weights for square images")
        cnn.check_against(config, {"image_size": side * patch})
        return side * patch

    def _transformer(self, shapes: Shapes, config: Mapping[str, Any], half: int) -> Node:
        """Sizes of one transformer, and what `_kind` adds."""
        prefix, role = self.prefixes[half], ("encoder", "decoder")[half]
        width = _shape(shapes, f"{prefix}.ln_post.weight")[0]
        layers = {int(found[1]) for name in shapes if (found := re.match(rf"{prefix}\.transformer\.(\d+)\.", name))}
        given = config.get(f"{role}_transformer") or {}
        cnn.check_against(given, {"width": width, "layers": len(layers)})
        norm = shapes.get(f"{prefix}.transformer.0.self_attn.q_norm.weight")
        heads = given.get("heads") or width // (norm[0] if norm else _HEAD_DIM)
        if heads < 1 or width % heads:
            raise UserError(f"{heads} heads do not fit a width of {width}", fix=f"give {role}_transformer.heads in the config")
        sizes = {"width": width, "layers": len(layers), "heads": heads}
        return self._kind(shapes, config, half) | sizes

    @abstractmethod
    def _kind(self, shapes: Shapes, config: Mapping[str, Any], half: int) -> Node:
        """Class and switches of one transformer: the first (0) or the second (1)."""

    def _semantic(self, shapes: Shapes, config: Mapping[str, Any]) -> Node | None:
        last = shapes.get(f"{self.prefixes[1]}.distill_mlp.4.weight")
        if last is None:
            return None
        cnn.check_against(config, {"out_inner_dim": last[0]})
        width = _shape(shapes, f"{self.prefixes[1]}.ln_post.weight")[0]
        depth = config.get("distill_depth") or _DISTILL_DEPTH
        return {"_target_": f"{cnn.MODELS}.semantic.ProjectionHead", "width": width, "dim": last[0], "depth": depth}


class GigaTok1D(GigaTokFamily):
    """`VQVitModelPlus`: tokens in a row."""

    name = "gigatok_1d"
    prefixes = ("s2to1encoder", "s1to2decoder")

    def _kind(self, shapes: Shapes, config: Mapping[str, Any], half: int) -> Node:
        prefix = self.prefixes[half]
        tokens = _shape(shapes, f"{prefix}.latent_token_positional_embedding")[0]
        cnn.check_against(config, {"num_latent_tokens": tokens})
        return {
            "_target_": f"{cnn.MODELS}.latent_transformers.{('TokenEncoder', 'TokenDecoder')[half]}",
            "tokens": tokens,
            "queries": (_first_queries, _second_queries)[half](shapes, config, prefix),
            "qk_norm": f"{prefix}.transformer.0.self_attn.q_norm.weight" in shapes,
        }


class GigaTok2D(GigaTokFamily):
    """`VQVitModel2DPlus`: tokens on a grid."""

    name = "gigatok_2d"
    prefixes = ("s2dencoder", "s2ddecoder")

    def _kind(self, shapes: Shapes, config: Mapping[str, Any], half: int) -> Node:
        prefix = self.prefixes[half]
        crosses = f"{prefix}.transformer.0.norm3.weight" in shapes
        layer = config.get("transformer_layer_type", "TransformerDecoderLayer" if crosses else "TransformerLayer")
        names = {"TransformerLayer": "plain", "TransformerDecoderLayer": "cross", "QformerLayerVar": "twin"}
        if layer not in names or crosses == (layer == "TransformerLayer"):
            raise UserError(f"transformer_layer_type {layer} does not fit the weights", fix="correct the config")
        return {
            "_target_": f"{cnn.MODELS}.latent_transformers.GridTransformer",
            "layer": names[layer],
            "kernel": _shape(shapes, f"{prefix}.conv_out.weight")[-1],
        }


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"missing {name}", fix="the file is incomplete: copy it again")
    return shapes[name]


def _decoder_class(shapes: Shapes) -> Node:
    adaptive = "decoder.adaptive.0.gamma.weight" in shapes
    if any(re.search(r"\.upsample\.conv1\.weight$", name) for name in shapes):
        return {"_target_": f"{cnn.MODELS}.adaptive.AdaptiveDecoder", "adaptive_norm": adaptive}
    if adaptive:
        raise UserError("a decoder with adaptive group norm but no depth-to-space", fix="set d2s_up where it was trained")
    return {"_target_": f"{cnn.MODELS}.conv.ConvDecoder"}


def _first_queries(shapes: Shapes, config: Mapping[str, Any], prefix: str) -> str:
    if f"{prefix}.query_1d" in shapes:
        return "learned"
    # A complete config that is silent means the original's default, which is off; no published model leaves it off.
    pooled = config.get("multi_level_query_init", "num_latent_tokens" not in config)
    return "pooled" if pooled else "mean"


def _second_queries(shapes: Shapes, config: Mapping[str, Any], prefix: str) -> str:
    for name in ("last_level_2d_query_init", "multi_level_2d_query_init"):
        if config.get(name):
            raise UserError(f"{name} is deprecated in GigaTok and unknown here", fix="give a model without it")
    return "learned" if f"{prefix}.q_2d" in shapes else "first"


def _spreads(state: Mapping[str, Tensor]) -> bool:
    """Whether the decoder upsamples by depth to space: four times as many channels leave the convolution."""
    weight = state.get("decoder.levels.0.resample.conv.weight")
    return weight is None or weight.shape[0] == 4 * weight.shape[1]


def _take_apart(state: State, stem: str) -> None:
    """One attention of theirs with normalised queries and keys: `q_proj`, `k_proj`, `v_proj`, `wo`."""
    for kind in ("weight", "bias"):
        parts = state.pop(f"{stem}in_proj_{kind}").chunk(3)
        state |= {f"{stem}{letter}_proj.{kind}": part.clone() for letter, part in zip("qkv", parts, strict=True)}
        state[f"{stem}wo.{kind}"] = state.pop(f"{stem}out_proj.{kind}")
