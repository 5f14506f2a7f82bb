"""LlamaGen's GPT (B … 3B, any size), of classes (c2i) and of texts (t2i), and D-AR's, which differs in its places alone."""

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
    "cls_embedding.cap_proj.fc1.weight": "condition.up.weight",
    "cls_embedding.cap_proj.fc2.weight": "condition.down.weight",
    "cls_embedding.uncond_embedding": "condition.nothing",
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
_CLASSES, _TEXT = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
_NOTHING = "cls_embedding.uncond_embedding"
_FIXED = {"norm_eps": 1e-5, "rope_base": 10000}  # arguments that no published size changes
_DEFAULT_TOKENS = 256
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


class LlamaGenGPT(Family):
    """`Transformer` with a class or a text as prefix: our `NextToken` over a square grid."""

    name = "llamagen_gpt"

    def recognise(self, shapes: Shapes) -> bool:
        """By the embedding, the head and the fused projection under their names."""
        return {"tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Sizes from the shapes; heads and grid from the config, else from the table of published sizes and 16 × 16."""
        vocab_size, dim = shapes["tok_embeddings.weight"]
        layers = 1 + max(int(found[1]) for name in shapes if (found := _LAYER.fullmatch(name)))
        sizes = {"vocab_size": vocab_size, "dim": dim, "n_layer": layers}
        _check_against(config, {**sizes, **_FIXED, **_condition_sizes(shapes)})
        return {
            "_target_": "tokar.models.generators.next_token.NextToken",
            "vocab_size": vocab_size,
            **_condition(shapes, dim),
            **self._places(shapes, config),
            "dim": dim,
            "layers": layers,
            "heads": _heads(shapes, config, dim, layers),
            "multiple_of": _multiple_of(config, dim, shapes),
            "token_dropout": config.get("token_dropout_p", 0.1),
            "resid_dropout": config.get("resid_dropout_p", 0.1),
            "ffn_dropout": config.get("ffn_dropout_p", 0.1),
            "drop_path": config.get("drop_path_rate", 0.0),
        }

    def _places(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """How many tokens there are, and how the network knows where each lies."""
        side = _side(shapes, config)
        return {"grid": [side, side]}

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
        """`logits [B, N, V]` of `indices` given `class_ids`, and `greedy_cfg2 [B, N]` for `sample_class_ids`.

        A text is `text_features [B, P, W]` and `text_mask [B, P]` in the place of `class_ids`.
        """
        model: Any = models["state"]
        answers = {"logits": model.logits(inputs["indices"], _condition_in(inputs))}
        if "sample_class_ids" in inputs:
            answers["greedy_cfg2"] = sample(model, inputs["sample_class_ids"], seed=0, guidance=2.0, greedy=True)
        return answers


def _back(name: str) -> str:
    names = {ours: theirs for theirs, ours in (_NAMES | _LAYER_NAMES).items()}
    if name not in names:
        raise UserError(f"{name} has no place in LlamaGen's GPT", fix="name the family that this model is of")
    return names[name]


class DARGPT(LlamaGenGPT):
    """D-AR's: the same tensors, but tokens in a row with the class at place 0. Nothing in the file tells: it must be named."""

    name = "d_ar"

    def _places(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        return {"n_tokens": _tokens(shapes, config), "positions": "rotary_class"}


def _condition_sizes(shapes: Shapes) -> dict[str, int]:
    """What the tensors say about the condition, under the original's argument names.

    Raises:
        UserError: there is no condition.
    """
    if _CLASSES in shapes:
        return {"num_classes": shapes[_CLASSES][0] - 1, "cls_token_num": 1}
    if _TEXT in shapes and _NOTHING in shapes:
        tokens, features = shapes[_NOTHING]
        return {"caption_dim": features, "cls_token_num": tokens}
    raise UserError(
        f"a LlamaGen GPT without {_NOTHING if _TEXT in shapes else _CLASSES}", fix="the file is incomplete: copy it again"
    )


def _condition(shapes: Shapes, dim: int) -> Node:
    sizes = _condition_sizes(shapes)
    if "num_classes" in sizes:
        return {"num_classes": sizes["num_classes"]}
    target = "tokar.models.generators.conditions.TextCondition"
    text = {"_target_": target, "dim": dim, "features": sizes["caption_dim"], "tokens": sizes["cls_token_num"]}
    return {"num_classes": 0, "condition": text}


def _condition_in(inputs: Mapping[str, Tensor]) -> Tensor:
    if "text_features" not in inputs:
        return inputs["class_ids"]
    features = inputs["text_features"]
    return torch.cat((features, inputs["text_mask"][..., None].to(features.dtype)), dim=-1)


def _check_against(config: Mapping[str, Any], found: Mapping[str, float]) -> None:
    for key, value in found.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]} in the config, but {value} in this model", fix="correct the config")


def _tokens(shapes: Shapes, config: Mapping[str, Any]) -> int:
    """Tokens of an image: from `block_size`, a rotary table left in the file (with rows for the prefix), or the default."""
    prefix = _condition_sizes(shapes)["cls_token_num"]
    rope: Sequence[int] = shapes.get(_ROPE, (prefix + _DEFAULT_TOKENS,))
    return int(config.get("block_size", rope[0] - prefix))


def _side(shapes: Shapes, config: Mapping[str, Any]) -> int:
    """Cells along a side of a square grid."""
    tokens = _tokens(shapes, config)
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
