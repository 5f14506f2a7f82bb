"""VAR's transformer (d12 … d36, plain or shared adaptive norm, any scales): `VAR` of its public repository."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..generators.orders import scales
from ..generators.plan import visible
from ..samplers.decode import sample
from .cnn import check_against, swap
from .family import Family, Node, Shapes, State
from .var import VARVQVAE

# Theirs, ours.
_NAMES = (
    ("blocks.#.attn.mat_qkv.", "transformer.blocks.#.attention.qkv."),
    ("blocks.#.attn.proj.", "transformer.blocks.#.attention.out."),
    ("blocks.#.attn.scale_mul_1H11", "transformer.blocks.#.attention.temperature"),
    ("blocks.#.ffn.fc1.", "transformer.blocks.#.mlp.up."),
    ("blocks.#.ffn.fc2.", "transformer.blocks.#.mlp.down."),
    ("blocks.#.ada_lin.1.", "transformer.blocks.#.modulation."),
    ("blocks.#.ada_gss", "transformer.blocks.#.offset"),
    ("shared_ada_lin.1.", "transformer.shared."),
    ("head_nm.ada_lin.1.", "transformer.final."),
    ("class_emb.", "classes."),
    ("pos_start", "start"),
    ("pos_1LC", "positions"),
    ("lvl_embed.", "levels."),
    ("word_embed.", "embed."),
)
_BIAS = re.compile(r"blocks\.(\d+)\.attn\.(q_bias|v_bias|zero_k_bias)")
_OUR_BIAS = re.compile(r"transformer\.blocks\.(\d+)\.attention\.qv_bias")
_LEVELS, _MASK = "lvl_1L", "attn_bias_for_masking"  # buffers that follow from the scales
_LEADING = {"start": 1, "positions": 1, "temperature": 1, "offset": 2}  # axes of length one that theirs begin with
_PUBLISHED = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)
_HEAD_DIM = 64
_MLP_RATIO, _EPS = 4, 1e-6


class VARGPT(Family):
    """`VAR`: our `NextScale`."""

    name = "var"
    parts = ("vqvae", "var")
    wrapper = "var_wo_ddp"

    def recognise(self, shapes: Shapes) -> bool:
        """By the tables of places and levels, and the fused projection under their names."""
        return {"pos_1LC", "lvl_embed.weight", "word_embed.weight", "blocks.0.attn.mat_qkv.weight"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """Sizes from the shapes; scales from `patch_nums`, else the published ones of that many places; 64 wide heads."""
        dim, embed_dim = shapes["word_embed.weight"]
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        found = {"depth": layers, "embed_dim": dim, "num_classes": shapes["class_emb.weight"][0] - 1}
        shared, unit = "shared_ada_lin.1.weight" in shapes, "blocks.0.attn.scale_mul_1H11" in shapes
        check_against(config, {**found, "vocab_size": shapes["head.weight"][0]})
        check_against(config, {"shared_aln": shared, "attn_l2_norm": unit, "z_channels": embed_dim})
        check_against(config, {"mlp_ratio": _MLP_RATIO, "norm_eps": _EPS})
        heads = shapes["blocks.0.attn.scale_mul_1H11"][1] if unit else int(config.get("num_heads", dim // _HEAD_DIM))
        return {
            "_target_": "tokar.models.generators.next_scale.NextScale",
            "vocab_size": shapes["head.weight"][0],
            "num_classes": found["num_classes"],
            "grids": [[side, side] for side in _scales(shapes, config)],
            "embed_dim": embed_dim,
            "dim": dim,
            "layers": layers,
            "heads": heads,
            "shared_modulation": shared,
            "qk_l2": unit,
            "drop_path": config.get("drop_path_rate", 0.0),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, join the two biases, drop buffers that follow from the scales and the keys' bias, which is zero."""
        ours: State = {}
        for name, value in state.items():
            if found := _BIAS.fullmatch(name):
                other = state.get(f"blocks.{found[1]}.attn.v_bias")
                if found[2] == "zero_k_bias" and not value.is_meta and value.any():
                    raise UserError("a bias of the keys that is not zero", where=name, fix="VAR has none: use its own weights")
                if found[2] == "q_bias" and other is not None:
                    ours[f"transformer.blocks.{found[1]}.attention.qv_bias"] = torch.stack((value, other))
            elif name not in (_LEVELS, _MASK):
                renamed = swap(name, _NAMES)
                ours[renamed] = value.flatten(0, axes) if (axes := _leading(renamed)) else value
                if renamed.endswith("temperature"):
                    ours[renamed] = value.flatten()[:, None]
        dropped = [name for name in state if name in (_LEVELS, _MASK) or name.endswith("zero_k_bias")]
        return ours, dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back, part the biases."""
        theirs: State = {}
        back = [(ours, theirs_) for theirs_, ours in _NAMES]
        for name, value in state.items():
            if found := _OUR_BIAS.fullmatch(name):
                query, kept = value.clone().unbind()
                stem = f"blocks.{found[1]}.attn."
                theirs |= {stem + "q_bias": query, stem + "v_bias": kept, stem + "zero_k_bias": torch.zeros_like(query)}
            elif name.endswith("temperature"):
                theirs[swap(name, back)] = value[None, :, :, None]
            else:
                theirs[swap(name, back)] = value[(None,) * _leading(name)]
        return theirs

    def finish(self, theirs: State, node: Node) -> State:
        """Their buffers: the scale of each place, and the mask as numbers to add."""
        plan = scales([(rows, columns) for rows, columns in node["grids"]])
        mask = torch.zeros(plan.n_slots, plan.n_slots).masked_fill(~visible(plan), -torch.inf)
        return {**theirs, _LEVELS: torch.tensor(plan.unit)[None], _MASK: mask[None, None]}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The tokenizer's answers, `logits [B, N, V]` of its codes, and `greedy_image_cfg1.5` in [0, 1]."""
        tokenizer: Any = models["vqvae"]
        model: Any = models["var"]
        answers = VARVQVAE().answers({"vqvae": tokenizer}, inputs, config)
        model.bind(tokenizer)
        if "image" in inputs and "class_ids" in inputs:
            answers["logits"] = model.logits(answers["indices"], inputs["class_ids"])
        if "sample_class_ids" in inputs:
            ramp = {"kind": "ramp", "value": 2.5}  # theirs counts from 0: 1 + 1.5
            codes = sample(model, inputs["sample_class_ids"], seed=0, guidance=ramp, greedy=True)
            answers["greedy_image_cfg1.5"] = (tokenizer.decode(codes).clamp(-1, 1) + 1) / 2
        return answers


def _leading(name: str) -> int:
    return _LEADING.get(name.rpartition(".")[2], 0)


def _scales(shapes: Shapes, config: Mapping[str, Any]) -> Sequence[int]:
    places, count = shapes["pos_1LC"][1], shapes["lvl_embed.weight"][0]
    given = config.get("patch_nums")
    known = [sides for sides in _PUBLISHED if len(sides) == count and sum(side**2 for side in sides) == places]
    if given is None and not known:
        raise UserError(f"{count} scales of unknown sides, {places} places", fix="give patch_nums in the config")
    sides = list(given or known[0])
    if len(sides) != count or sum(side**2 for side in sides) != places:
        raise UserError(f"patch_nums {sides} do not make the {places} places of the weights", fix="correct the config")
    return sides
