"""GigaTok's `gpt_1d`: LlamaGen's blocks over a row of tokens, with learned places, and perhaps adaptive layer norm.

Its other generator, `gpt-2d`, is LlamaGen's and read as that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .family import Node, Shapes, State
from .llamagen_gpt import LlamaGenGPT

_PLACES = "positional_embedding"
_BLOCK_ADA, _BLOCK_OFFSET, _SHARED_ADA = "layers.0.adaLN_modulation.1.weight", "layers.0.ada_gss", "adaLN.1.weight"
_Q_NORM = "layers.0.attention.q_norm.weight"
# Theirs, ours; `{}` is the number of the block. The rest is LlamaGen's.
_NAMES = {
    _PLACES: "positions",
    "layers.{}.attention.q_norm.weight": "transformer.blocks.{}.attention.norms.0.weight",
    "layers.{}.attention.q_norm.bias": "transformer.blocks.{}.attention.norms.0.bias",
    "layers.{}.attention.k_norm.weight": "transformer.blocks.{}.attention.norms.1.weight",
    "layers.{}.attention.k_norm.bias": "transformer.blocks.{}.attention.norms.1.bias",
    "layers.{}.adaLN_modulation.1.weight": "transformer.blocks.{}.modulation.weight",
    "layers.{}.adaLN_modulation.1.bias": "transformer.blocks.{}.modulation.bias",
    "layers.{}.ada_gss": "transformer.blocks.{}.offset",
    "adaLN.1.weight": "transformer.shared.weight",
    "adaLN.1.bias": "transformer.shared.bias",
    "final_adaLN.1.weight": "transformer.final.weight",
    "final_adaLN.1.bias": "transformer.final.bias",
}
# Of attention and feed-forward they keep (shift, scale, gate) each, we gates, scales, shifts of both; at the end they keep
# (shift, scale), we (scale, shift). Entry i: which of theirs is our i-th.
_SIX, _TWO = (2, 5, 1, 4, 0, 3), (1, 0)
_NUMBER = re.compile(r"(?<=layers\.|blocks\.)(\d+)(?=\.)")


class GigaTokGPT(LlamaGenGPT):
    """`Transformer` of `gpt_1d` with a class: our `NextToken` over a row."""

    name = "gigatok_gpt"

    def recognise(self, shapes: Shapes) -> bool:
        """LlamaGen's names and, beside them, places or adaptive layer norm."""
        return super().recognise(shapes) and bool({_PLACES, _BLOCK_ADA, _SHARED_ADA} & set(shapes))

    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """See `LlamaGenGPT`; what is switched on shows in the tensors, the width of a head where it has a norm."""
        if _PLACES not in shapes or config.get("rope"):
            raise UserError(
                "a GigaTok GPT with rotary places, which its code computes wrongly and no released model has",
                fix="give weights with positional_embedding",
            )
        if _Q_NORM in shapes:
            config = {"n_head": shapes["tok_embeddings.weight"][1] // shapes[_Q_NORM][0], **config}
        modulation = "block" if _BLOCK_ADA in shapes else "shared" if _BLOCK_OFFSET in shapes else "none"
        return {**super().config_from(shapes, config), "qk_norm": _Q_NORM in shapes, "modulation": modulation}

    def _places(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        tokens = shapes[_PLACES][0] - 1
        if config.get("block_size", tokens) != tokens:
            raise UserError(
                f"block_size is {config['block_size']} in the config, but {tokens} in this model", fix="correct the config"
            )
        return {"n_tokens": tokens, "positions": "learned"}

    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Rename, join gate and up, and put the vectors of adaptive layer norm into our order."""
        own = {name: value for name, value in state.items() if _pattern(name) in _NAMES}
        ours, dropped = super().to_ours({name: value for name, value in state.items() if name not in own})
        for name, value in own.items():
            ours[_renamed(name, _NAMES)] = _reordered(name, value, _SIX, _TWO)
        return ours, dropped

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Back."""
        names = {ours: theirs for theirs, ours in _NAMES.items()}
        own = {name: value for name, value in state.items() if _pattern(name) in names}
        theirs = super().to_theirs({name: value for name, value in state.items() if name not in own})
        for name, value in own.items():
            back = _renamed(name, names)
            theirs[back] = _reordered(back, value, _inverse(_SIX), _inverse(_TWO))
        return theirs


def _pattern(name: str) -> str:
    return _NUMBER.sub("{}", name, count=1)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    number = _NUMBER.search(name)
    return names[_pattern(name)].format(number[1] if number else "")


def _reordered(name: str, value: Tensor, six: Sequence[int], two: Sequence[int]) -> Tensor:
    """A tensor of theirs, by its name, with its vectors in another order; their offsets have two axes of length 1 more."""
    if name.endswith("ada_gss"):
        return value[0, 0, list(six)] if value.ndim == 4 else value[list(six)][None, None]
    if "adaLN" not in name:
        return value
    parts = value.chunk(2 if name.startswith("final_") else 6)
    return torch.cat([parts[index] for index in (two if name.startswith("final_") else six)])


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
