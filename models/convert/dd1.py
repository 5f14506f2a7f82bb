"""Distilled Decoding 1's one-step students: of VAR (`DD_Model`) and of LlamaGen (`DDTransformer`) in its public repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distill.codebook import codebook_of, decode_vectors
from ..distill.dd1 import compose
from ..distill.student import Student
from .cnn import swap
from .family import Node, Shapes, State
from .llamagen_gpt import LlamaGenGPT
from .var_gpt import VARGPT

# Theirs, ours.
_NAMES = (
    ("n_d_embed.", "flags."),
    ("layerwise_n_d_embed.#.", "flag_layers.#."),
    ("final_layer_conti.linear.", "vector_head.out."),
    ("final_layer_conti.scale_shift_table", "vector_head.offset"),
)
_BACK = tuple((ours, theirs) for theirs, ours in _NAMES)
_PLACES, _LEVELS = "pos_1LC", "lvl_embed.weight"
_TOKENS = "tok_embeddings.weight"
_SPLIT_TOKENS = {12: 80, 24: 130}  # of LlamaGen-B and -L by their layers
_LAST_STEP = 80


class DD1VAR(VARGPT):
    """`DD_Model`: our `ScaleStudent`."""

    name = "dd1_var"
    parts = ("vqvae", "student")
    wrapper = "ema_parameters"

    def recognise(self, shapes: Shapes) -> bool:
        """As VAR, with a flag embedding and a second head."""
        return super().recognise(shapes) and {"n_d_embed.weight", "final_layer_conti.scale_shift_table"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """The teacher's sizes as of VAR, without the class's own place and level; steps and split from the config.

        The weights do not tell those two: by default the published ones, scale 5 (d16) or 4 of ten, else the middle one.
        """
        (_, places, dim), (levels, _) = shapes[_PLACES], shapes[_LEVELS]
        teacher = super().config_from({**shapes, _PLACES: (1, places - 1, dim), _LEVELS: (levels - 1, dim)}, config)
        scales, layers = levels - 1, teacher["layers"]
        usual = (5 if layers <= 16 else 4) if scales == 10 else max(1, scales // 2)
        return {
            "_target_": "tokar.models.distill.scale_student.ScaleStudent",
            "teacher": teacher,
            "timesteps": sorted({0, *config.get("t_list", (0, min(usual, scales - 1)))}),
            "split": config.get("split_scale", usual),
            "flag_layers": "layerwise_n_d_embed.0.weight" in shapes,
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """As VAR's, and the names of the student's own parts."""
        ours, dropped = super().to_ours(state)
        return {swap(name, _NAMES): value for name, value in ours.items()}, dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back."""
        return super().to_theirs({swap(name, _BACK): value for name, value in state.items()})

    def finish(self, theirs: State, node: Node) -> State:
        """Their buffers: the level of each place, and the mask as numbers to add."""
        sizes = [1, *(rows * columns for rows, columns in node["teacher"]["grids"])]
        level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        blind = (level[:, None] <= level) & ~torch.eye(len(level), dtype=torch.bool)
        mask = torch.zeros(len(level), len(level)).masked_fill(blind, -torch.inf)
        return {**theirs, "lvl_1L": level[None], "attn_bias_for_masking": mask[None, None]}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Of every step: `stepK_logits`, `stepK_continuous`, `stepK_sequence [B, N, D]`, `stepK_image` in [0, 1]."""
        tokenizer: Any = models["vqvae"]
        student: Any = models["student"]
        return step_answers(student, tokenizer, inputs["class_ids"], inputs["noise"], config.get("t_list", student.timesteps))


def step_answers(student: Student, tokenizer: Any, classes: Tensor, noise: Tensor, steps: list[int]) -> dict[str, Tensor]:
    """What the original says at each of its steps, by the names of a parity file."""
    codebook, x = codebook_of(tokenizer), noise
    answers: dict[str, Tensor] = {}
    for number, step in enumerate(steps, start=1):
        done = torch.full((len(noise),), student.tokens_in(step))
        x = torch.where(student.pending(done)[..., None], noise, x)
        found = student(x, classes, done)
        x = compose(student, found, x, codebook, step)
        image = (decode_vectors(tokenizer, x).clamp(-1, 1) + 1) / 2
        parts = {"logits": found.logits, "continuous": found.vectors, "sequence": x, "image": image}
        answers |= {f"step{number}_{name}": value for name, value in parts.items()}
    return answers


class DD1LlamaGen(LlamaGenGPT):
    """`DDTransformer`: our `TokenStudent`."""

    name = "dd1_llamagen"

    def recognise(self, shapes: Shapes) -> bool:
        """As LlamaGen's GPT, with a flag embedding and a second head."""
        return super().recognise(shapes) and {"n_d_embed.weight", "final_layer_conti.scale_shift_table"} <= set(shapes)

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """The teacher's sizes as of LlamaGen's GPT; steps and split from the config, by default the published ones."""
        dim, embed_dim = shapes[_TOKENS]
        vocab_size = shapes["output.weight"][0]
        teacher = super().config_from({**shapes, _TOKENS: (vocab_size, dim)}, config)
        tokens = teacher["grid"][0] * teacher["grid"][1]
        usual = _LAST_STEP if tokens > _LAST_STEP else max(1, tokens // 3)
        return {
            "_target_": "tokar.models.distill.token_student.TokenStudent",
            "teacher": teacher,
            "embed_dim": embed_dim,
            "timesteps": sorted({0, *config.get("t_list", (0, min(usual, tokens - 1)))}),
            "split": config.get("split_t", min(tokens, _SPLIT_TOKENS.get(teacher["layers"], usual))),
        }

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """As LlamaGen's GPT, and the names of the student's own parts."""
        ours, dropped = super().to_ours({name: value for name, value in state.items() if not _is_extra(name)})
        ours["embed.weight"] = ours.pop("tokens.weight")
        extra = {swap(name, _NAMES): value for name, value in state.items() if _is_extra(name)}
        bias = extra.pop("tok_embeddings.bias", None)
        return {**ours, **extra, **({} if bias is None else {"embed.bias": bias})}, dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Rename back."""
        own = {name: value for name, value in state.items() if swap(name, _BACK) != name}
        rest = {name: value for name, value in state.items() if name not in own}
        extra = {"tok_embeddings.bias": rest.pop("embed.bias")}
        rest["tokens.weight"] = rest.pop("embed.weight")
        return {**super().to_theirs(rest), **extra, **{swap(name, _BACK): value for name, value in own.items()}}

    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`logits` and `continuous` of one call from `noise` with `class_ids`, its first `done [B]` tokens being data."""
        model: Any = models["state"]
        done = inputs.get("done", torch.zeros(len(inputs["noise"]), dtype=torch.int64))
        found = model(inputs["noise"], inputs["class_ids"], done)
        return {"logits": found.logits, "continuous": found.vectors}


def _is_extra(name: str) -> bool:
    return name == "tok_embeddings.bias" or swap(name, _NAMES) != name
