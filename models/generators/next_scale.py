"""Next-scale generators, which predict all tokens of a scale from the image so far: what all share, and VAR (arXiv:2404.02905).

Shapes: `B` batch, `N` tokens of all scales, `n` of one scale, `L` slots of one pass, `C` width, `D` width of a code,
`V` vocabulary. Codes lie scale by scale, coarse first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...ranges import Fraction, NonNegativeFloat, PositiveInt
from ..tokenizers.base import Tokenizer
from ..tokenizers.multiscale import MultiScaleTokenizer
from .orders import Grid
from .orders import scales as scales_plan
from .planned import Facts, PlannedGenerator
from .transformer import TransformerConfig

_SOFT_SCALE = 0.25  # VAR's factor of the scores where queries and keys are not of unit length


class Loan:
    """A network that is used but not owned: neither trained nor saved with its user, and shared by the user's copies."""

    def __init__(self, module: MultiScaleTokenizer) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Loan:
        return self


class ScaleGenerator(PlannedGenerator):
    """Slots of a scale hold what the tokenizer shows of the scales before; the class modulates every block.

    The first scale begins with the class. A family says where slots are (`_places`), and calls `_init_weights` when all its
    parameters are there.

    Args:
        grids: rows and columns of each scale, coarse first.
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        embed_dim: width of a code `D`.
        config: of the transformer.
        label_smoothing: of the cross-entropy.
    """

    needs_tokenizer = True
    undecayed: tuple[str, ...] = ("start", "positions", "levels.weight", "offset", "temperature", "qv_bias")

    def __init__(
        self,
        grids: tuple[Grid, ...],
        vocab_size: int,
        num_classes: int,
        embed_dim: int,
        config: TransformerConfig,
        label_smoothing: float,
    ) -> None:
        super().__init__(scales_plan(grids), vocab_size, num_classes, config, label_smoothing)
        self.grids, self.embed_dim = grids, embed_dim
        self.classes = nn.Embedding(num_classes + 1, config.dim)
        self.start = nn.Parameter(torch.empty(self.plan.span(0).stop, config.dim))
        self.embed = nn.Linear(embed_dim, config.dim)
        self.head = nn.Linear(config.dim, vocab_size)
        self._tokenizer: Loan | None = None

    @abstractmethod
    def _places(self, slots: slice) -> Tensor:
        """What says where each of these slots is, `[L, C]`, added to its input."""

    @property
    def initial_std(self) -> float:
        """VAR's: of variance 1/(3C)."""
        return math.sqrt(1 / (3 * self.transformer.config.dim))

    @torch.no_grad()
    def _init_weights(self, gate_init: float) -> None:
        """VAR's: truncated normals of variance 1/(3C), less for what is added to the residual stream."""
        dim, layers, std = self.transformer.config.dim, self.transformer.config.layers, self.initial_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start, std=std)
        self.head.weight.mul_(0.02)
        for name, weight in self.transformer.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.div_(math.sqrt(2 * layers))
            elif name.endswith("modulation.weight"):
                weight[: 2 * dim].mul_(gate_init)
                weight[2 * dim :].mul_(0.5)
            elif name.endswith("offset"):
                weight[:2].mul_(gate_init)
        assert self.transformer.final is not None
        self.transformer.final.weight.mul_(0.5)

    def bind(self, tokenizer: Tokenizer) -> None:
        """Reconstruct with this tokenizer.

        Raises:
            UserError: it has no scales, or others.
        """
        if not isinstance(tokenizer, MultiScaleTokenizer):
            raise UserError(
                f"next-scale needs a multi-scale tokenizer, this one is a {type(tokenizer).__name__}",
                where="generator",
                fix="train on the codes of MultiScaleVQ or FlexVAR, or choose a next-token generator",
            )
        if tokenizer.grids != self.grids:
            raise UserError(
                f"scales {self.grids}, but the tokenizer's are {tokenizer.grids}", where="generator", fix="make them equal"
            )
        self._tokenizer = Loan(tokenizer)

    @property
    def tokenizer(self) -> MultiScaleTokenizer:
        """The one that was bound.

        Raises:
            UserError: none was.
        """
        if self._tokenizer is None:
            raise UserError("a next-scale generator reconstructs as it goes", fix="give its tokenizer: decode_with=…")
        return self._tokenizer.module

    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        parts = []
        if slots.start == 0:
            parts.append(self.classes(condition)[:, None] + self.start)
        if slots.stop > len(self.start):
            parts.append(self.embed(self._seen(codes, slots, carry).to(self.embed.weight.dtype)))
        return torch.cat(parts, dim=1) + self._places(slots)

    @torch.no_grad()
    def _seen(self, codes: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        """What the slots behind the first scale see of the reconstruction, `[B, L, D]`."""
        if carry is not None:
            return self.tokenizer.next_input(carry, self.plan.unit[slots.start] - 1)
        return self.tokenizer.teacher_inputs(codes)[:, : slots.stop - len(self.start)]

    def _modulation(self, condition: Tensor, slots: slice) -> Tensor | None:
        return self.classes(condition)[:, None]

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        return self.head(hidden)

    def _begin_carry(self, rows: int) -> Tensor | None:
        return self.tokenizer.start(rows)

    def _advance(self, carry: Tensor | None, unit: int, values: Tensor) -> Tensor | None:
        assert carry is not None
        return self.tokenizer.add_scale(carry, unit, values)


def var_config(dim: int, layers: int, heads: int, shared_modulation: bool, qk_l2: bool, drop_path: float) -> TransformerConfig:
    """The switches of VAR's transformer."""
    return TransformerConfig(
        dim,
        layers,
        heads,
        norm="plain",
        mlp="gelu",
        bias="keyless",
        qk_norm="l2" if qk_l2 else "none",
        attention_scale=None if qk_l2 else _SOFT_SCALE * (dim // heads) ** -0.5,
        modulation="shared" if shared_modulation else "block",
        drop_path=drop_path,
    )


class NextScale(ScaleGenerator):
    """VAR: slots of a scale hold the reconstruction so far, resized to its grid; the class modulates every block.

    The first scale begins with the class. Every slot adds a learned vector of its place and one of its scale.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grids: rows and columns of each scale, coarse first.
        embed_dim: width of a code `D`.
        dim: width `C`; VAR: 64 for each block.
        layers: number of blocks.
        heads: attention heads; VAR: as many as blocks.
        shared_modulation: one projection of the class for all blocks, to which each adds its own vectors (VAR d36).
        qk_l2: unit queries and keys with a learned temperature for each head.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first; VAR: 0.1·layers/24.
        gate_init: scale of the initial γ of each block; VAR: 1e-3 for small models … 5e-6 for d36.
        label_smoothing: of the cross-entropy.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grids: Sequence[Sequence[PositiveInt]],
        embed_dim: PositiveInt,
        dim: PositiveInt = 1024,
        layers: PositiveInt = 16,
        heads: PositiveInt = 16,
        shared_modulation: bool = False,
        qk_l2: bool = True,
        drop_path: Fraction = 0.0,
        gate_init: NonNegativeFloat = 1e-3,
        label_smoothing: Fraction = 0.0,
    ) -> None:
        config = var_config(dim, layers, heads, shared_modulation, qk_l2, drop_path)
        pairs = tuple((rows, columns) for rows, columns in grids)
        super().__init__(pairs, vocab_size, num_classes, embed_dim, config, label_smoothing)
        self.positions = nn.Parameter(torch.empty(self.plan.n_slots, dim))
        self.levels = nn.Embedding(len(self.grids), dim)
        self._level_of = Facts(torch.tensor(self.plan.unit, device="cpu"))
        self._init_weights(gate_init)
        nn.init.trunc_normal_(self.positions, std=self.initial_std)

    def _places(self, slots: slice) -> Tensor:
        return self.positions[slots] + self.levels(self._level_of.on(self.positions.device)[slots])
