"""RAR's transformer (B … XXL, any size): `RAR` of the public repository 1d-tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .cnn import check_against, swap
from .family import Family, Node, Shapes, State

# Theirs, ours.
_NAMES = (
    ("blocks.#.attn.qkv.", "transformer.blocks.#.attention.qkv."),
    ("blocks.#.attn.proj.", "transformer.blocks.#.attention.out."),
    ("blocks.#.attn.q_norm.", "transformer.blocks.#.attention.norms.0."),
    ("blocks.#.attn.k_norm.", "transformer.blocks.#.attention.norms.1."),
    ("blocks.#.mlp.fc1.", "transformer.blocks.#.mlp.up."),
    ("blocks.#.mlp.fc2.", "transformer.blocks.#.mlp.down."),
    ("blocks.#.norm1.", "transformer.blocks.#.norm1."),
    ("blocks.#.norm2.", "transformer.blocks.#.norm2."),
    ("blocks.#.adaLN_modulation.1.", "transformer.blocks.#.modulation."),
    ("adaln_before_head.adaLN_modulation.1.", "transformer.final."),
    ("embeddings.", "tokens."),
    ("cls_token", "start"),
    ("pos_embed", "positions"),
    ("target_aware_pos_embed", "targets"),
    ("timesteps_embeddings", "steps"),
    ("lm_head.", "head."),
)
_BACK = tuple((ours, theirs) for theirs, ours in _NAMES)
_LEADING = {"cls_token": 2, "pos_embed": 1, "target_aware_pos_embed": 1, "timesteps_embeddings": 1}  # axes of length one
_OUR_CHUNKS, _THEIR_CHUNKS = (2, 5, 1, 4, 0, 3), (4, 2, 0, 5, 3, 1)  # theirs: shift, scale, γ of attention, then of the MLP
_SPARE_POSITIONS, _SPARE_STEPS, _PREFIX = 1024, 100, 2  # their tables have that many rows more than there are tokens


class RARGenerator(Family):
    """`RAR`: ours of that name."""

    name = "rar"

    def recognise(self, shapes: Shapes) -> bool:
        """By its three tables of places and steps."""
        return {"pos_embed", "target_aware_pos_embed", "timesteps_embeddings", "lm_head.weight"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Everything from the shapes; the grid is a square."""
        vocab_size, dim = shapes["lm_head.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        n_tokens = shapes["pos_embed"][1] - _SPARE_POSITIONS
        num_classes = shapes["embeddings.weight"][0] - vocab_size - 2
        hidden, heads = shapes["blocks.0.mlp.fc1.weight"][0], dim // shapes["blocks.0.attn.q_norm.weight"][0]
        found = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden}
        check_against(config, {**found, "image_seq_len": n_tokens, "condition_num_classes": num_classes})
        side = math.isqrt(max(n_tokens, 0))
        if n_tokens < 1 or side * side != n_tokens or shapes["timesteps_embeddings"][1] != n_tokens + _SPARE_STEPS:
            raise UserError(f"tables of places and steps for {n_tokens} tokens", fix="give weights of a square grid")
        return {
            "_target_": "tokar.models.generators.permuted.RAR",
            "vocab_size": vocab_size,
            "num_classes": num_classes,
            "grid": [side, side],
            "dim": dim,
            "layers": layers,
            "heads": heads,
            "hidden": hidden,
            "dropout": config.get("dropout", 0.1),
            "attention_dropout": config.get("attn_drop", 0.1),
            "spare_positions": _SPARE_POSITIONS - _PREFIX,
            "spare_steps": _SPARE_STEPS - _PREFIX + 1,
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, bring the vectors of each modulation into our order, drop axes of length one."""
        ours = {
            swap(name, _NAMES): _reordered(value, name, _OUR_CHUNKS).flatten(0, _LEADING.get(name, 0))
            for name, value in state.items()
        }
        return ours, []

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, in their order, with their axes of length one."""
        named = {swap(name, _BACK): value for name, value in state.items()}
        return {name: _reordered(value, name, _THEIR_CHUNKS)[(None,) * _LEADING.get(name, 0)] for name, value in named.items()}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`logits [B, N, V]` of `indices` given `class_ids`, in raster order."""
        model: Any = models["state"]
        return {"logits": model.logits(inputs["indices"], inputs["class_ids"])}


def _reordered(value: Tensor, name: str, order: tuple[int, ...]) -> Tensor:
    """The six parts of a block's modulation (`name` is theirs) in another order; other tensors as they are."""
    if ".adaLN_modulation." not in name or not name.startswith("blocks."):
        return value
    parts = value.chunk(len(order))
    return torch.cat([parts[index] for index in order])
