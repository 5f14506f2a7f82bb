"""LlamaGen's class-conditional GPT (B … 3B, any size): `Transformer` of its public repository."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..generators.next_token import SIZES
from ..layers import swiglu_hidden
from ..samplers.decode import sample
from .family import Family, Node, Shapes, State

# Theirs, ours. Only the feed-forward differs in more than its name: they keep gate (w1) and up (w3) apart, we keep one matrix.
_NAMES = {
    "cls_embedding.embedding_table.weight": "classes.weight",
    "tok_embeddings.weight": "tokens.weight",
    "norm.weight": "transformer.norm.weight",
    "output.weight": "head.weight",
}
_LAYER_NAMES = {
    "attention.wqkv.weight": "attention.qkv.weight",
    "attention.wo.weight": "attention.out.weight",
    "feed_forward.w2.weight": "mlp.down.weight",
    "attention_norm.weight": "norm1.weight",
    "ffn_norm.weight": "norm2.weight",
}
_GATE, _UP, _GATE_UP = "feed_forward.w1.weight", "feed_forward.w3.weight", "mlp.gate_up.weight"
_LAYER, _BLOCK = re.compile(r"layers\.(\d+)\.(.+)"), re.compile(r"transformer\.blocks\.(\d+)\.(.+)")
_ROPE = "freqs_cis"
_FIXED = {"norm_eps": 1e-5, "rope_base": 10000, "cls_token_num": 1}  # arguments that no published size changes
_DEFAULT_TOKENS = 256
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


class LlamaGenGPT(Family):
    """`Transformer` with a class prefix: our `NextToken` over a square grid."""

    name = "llamagen_gpt"

    def recognise(self, shapes: Shapes) -> bool:
        """By the embedding, the head and the fused projection under their names."""
        return {"tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Sizes from the shapes; heads and grid from the config, else from the table of published sizes and 16 × 16."""
        _refuse_other_conditions(shapes)
        vocab_size, dim = shapes["tok_embeddings.weight"]
        layers = 1 + max(int(found[1]) for name in shapes if (found := _LAYER.fullmatch(name)))
        num_classes = shapes["cls_embedding.embedding_table.weight"][0] - 1
        sizes = {"vocab_size": vocab_size, "dim": dim, "n_layer": layers, "num_classes": num_classes}
        _check_against(config, {**sizes, **_FIXED})
        side = _side(shapes, config)
        return {
            "_target_": "tokar.models.generators.next_token.NextToken",
            "vocab_size": vocab_size,
            "num_classes": num_classes,
            "grid": [side, side],
            "dim": dim,
            "layers": layers,
            "heads": _heads(shapes, config, dim, layers),
            "multiple_of": _multiple_of(config, dim, shapes),
            "token_dropout": config.get("token_dropout_p", 0.1),
            "resid_dropout": config.get("resid_dropout_p", 0.1),
            "ffn_dropout": config.get("ffn_dropout_p", 0.1),
            "drop_path": config.get("drop_path_rate", 0.0),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, join gate and up, drop the rotary table (it follows from the sizes)."""
        ours: State = {}
        for name, value in state.items():
            layer = _LAYER.fullmatch(name)
            block = f"transformer.blocks.{layer[1]}." if layer else ""
            if layer and layer[2] == _GATE:
                up = state.get(f"layers.{layer[1]}.{_UP}")
                ours[block + _GATE_UP] = value if up is None else torch.cat((value, up))
            elif layer and layer[2] != _UP:
                ours[block + _LAYER_NAMES.get(layer[2], layer[2])] = value
            elif not layer and name != _ROPE:
                ours[_NAMES.get(name, name)] = value
        return ours, [name for name in state if name == _ROPE]

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, part gate and up."""
        theirs: State = {}
        for name, value in state.items():
            block = _BLOCK.fullmatch(name)
            layer, inner = (f"layers.{block[1]}.", block[2]) if block else ("", name)
            if block and inner == _GATE_UP:
                gate, up = (half.clone() for half in value.chunk(2))
                theirs |= {layer + _GATE: gate, layer + _UP: up}
            else:
                theirs[layer + _back(inner)] = value
        return theirs

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`logits [B, N, V]` of `indices` given `class_ids`, and `greedy_cfg2 [B, N]` for `sample_class_ids`."""
        model: Any = models["state"]
        answers = {"logits": model.logits(inputs["indices"], inputs["class_ids"])}
        if "sample_class_ids" in inputs:
            answers["greedy_cfg2"] = sample(model, inputs["sample_class_ids"], seed=0, guidance=2.0, greedy=True)
        return answers


def _back(name: str) -> str:
    names = {ours: theirs for theirs, ours in (_NAMES | _LAYER_NAMES).items()}
    if name not in names:
        raise UserError(f"{name} has no place in LlamaGen's GPT", fix="name the family that this model is of")
    return names[name]


def _refuse_other_conditions(shapes: Shapes) -> None:
    if any(name.startswith("cls_embedding.cap_proj.") for name in shapes):
        raise UserError("a text-conditional LlamaGen", fix="only class-conditional (c2i) weights can be read")
    if "cls_embedding.embedding_table.weight" not in shapes:
        raise UserError(
            "a LlamaGen GPT without cls_embedding.embedding_table.weight", fix="give class-conditional (c2i) weights"
        )


def _check_against(config: Mapping[str, Any], found: Mapping[str, float]) -> None:
    for key, value in found.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]} in the config, but {value} in this model", fix="correct the config")


def _side(shapes: Shapes, config: Mapping[str, Any]) -> int:
    """Cells along a side: from `block_size`, a rotary table left in the file (with one row for the class), or the default."""
    rope: Sequence[int] = shapes.get(_ROPE, (1 + _DEFAULT_TOKENS,))
    tokens = int(config.get("block_size", rope[0] - 1))
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"block_size {tokens} is not a square", fix="give the number of tokens of a square grid")
    return side


def _heads(shapes: Shapes, config: Mapping[str, Any], dim: int, layers: int) -> int:
    published = {(width, depth): heads for width, depth, heads in SIZES.values()}
    if config.get("n_head") is not None:
        heads = int(config["n_head"])
    elif _ROPE in shapes:
        heads = dim // (2 * shapes[_ROPE][1])
    else:
        heads = published.get((dim, layers), dim // 64)
    if config.get("n_kv_head") not in (None, heads):
        raise UserError(f"n_kv_head {config['n_kv_head']} differs from n_head {heads}", fix="grouped queries are not supported")
    if heads < 1 or dim % heads:
        raise UserError(f"{heads} heads do not fit a width of {dim}", fix="give n_head in the config")
    return heads


def _multiple_of(config: Mapping[str, Any], dim: int, shapes: Shapes) -> int:
    """The largest rounding that gives the hidden width in the weights."""
    gate = f"layers.0.{_GATE}"
    if gate not in shapes:
        raise UserError(f"missing {gate}", fix="the file is incomplete: copy it again")
    hidden = shapes[gate][0]
    candidates = [int(config["multiple_of"])] if "multiple_of" in config else list(_MULTIPLES)
    for candidate in candidates:
        if swiglu_hidden(dim, candidate) == hidden:
            return candidate
    raise UserError(f"a feed-forward {hidden} wide does not follow from dim {dim}", fix="correct multiple_of in the config")
