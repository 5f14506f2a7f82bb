"""Randomized next-token generator: RAR (arXiv:2411.00776), which learns every order and ends with the raster one.

Shapes: `B` batch, `N` tokens of an image, `S = N + 1` slots, `L` slots of one pass, `C` width, `V` vocabulary.
Slot 0 is a learned start, slot 1 the class, slot `i + 2` holds the i-th token of the order. Slot `i + 1` predicts it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, NonNegativeInt, PositiveInt
from .orders import raster_or_sequence
from .planned import Facts, PlannedGenerator
from .transformer import TransformerConfig

_PREFIX = 2
_STD = 0.02


class RAR(PlannedGenerator):
    """RAR: in training each sample is fed in an order of its own with a probability that falls from 1 to 0.

    A slot adds the position of what it holds and, from another table, that of the token it is to predict: so the network
    knows the order. Class and step modulate every block. Sampling and evaluation are in raster order.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more id stands for "no class". One table embeds codes, an unused id, and classes.
        grid: rows and columns of the tokens, in raster order.
        n_tokens: number of tokens of a 1-D tokenizer. Exactly one of `grid`, `n_tokens`.
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads.
        hidden: width of the feed-forward; `None`: four times `dim`.
        anneal_start: share of the training up to which every order is random.
        anneal_end: share from which on every order is the raster one; in between the probability falls linearly.
        dropout: rate after attention and in the feed-forward.
        attention_dropout: rate on the attention weights.
        spare_positions: rows that both tables of positions have beyond those in use (1022 in the published weights).
        spare_steps: rows that the table of steps has beyond those in use (99 in the published weights).

    Raises:
        ValueError: the heads do not divide the width, not exactly one of `grid` and `n_tokens`, or an end before its start.
    """

    undecayed = ("tokens.weight", "positions", "targets", "steps", "final.weight")
    """As RAR's trainer has it."""

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        n_tokens: PositiveInt | None = None,
        dim: PositiveInt = 768,
        layers: PositiveInt = 24,
        heads: PositiveInt = 16,
        hidden: PositiveInt | None = None,
        anneal_start: Fraction = 0.5,
        anneal_end: Fraction = 0.75,
        dropout: Fraction = 0.1,
        attention_dropout: Fraction = 0.1,
        spare_positions: NonNegativeInt = 0,
        spare_steps: NonNegativeInt = 0,
    ) -> None:
        if anneal_end < anneal_start:
            raise ValueError(f"anneal_end {anneal_end} lies before anneal_start {anneal_start}; swap them")
        config = TransformerConfig(
            dim,
            layers,
            heads,
            norm="layer",
            final_norm="plain",
            mlp="gelu_exact",
            bias="all",
            qk_norm="layer",
            modulation="block",
            hidden=hidden,
            attention_dropout=attention_dropout,
            resid_dropout=dropout,
            ffn_dropout=dropout,
        )
        super().__init__(raster_or_sequence(grid, n_tokens, _PREFIX), vocab_size, num_classes, config)
        self.anneal_start, self.anneal_end = anneal_start, anneal_end
        self.noise_size = 1 + self.plan.n_tokens
        # A tensor, not a number: one that changes at every step would make torch.compile compile at every step.
        self._randomness = torch.ones((), device="cpu")
        self._raster = Facts(torch.arange(self.plan.n_tokens, device="cpu"))
        rows = _PREFIX + self.plan.n_tokens + spare_positions
        self.start = nn.Parameter(torch.zeros(dim))
        self.tokens = nn.Embedding(vocab_size + 1 + num_classes + 1, dim)
        self.positions = nn.Parameter(torch.empty(rows, dim))
        self.targets = nn.Parameter(torch.empty(rows, dim))
        self.steps = nn.Parameter(torch.empty(self.plan.n_slots + spare_steps, dim))
        self.head = nn.Linear(dim, vocab_size)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """RAR's: truncated normals, and modulation that begins as none."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.positions, self.targets, self.steps):
            nn.init.trunc_normal_(table, std=_STD)
        for layer in (self.transformer.final, *(block.modulation for block in self.transformer.blocks)):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    def anneal(self, progress: float) -> None:
        """Set the probability of a random order: 1 up to `anneal_start`, 0 from `anneal_end` on."""
        span = self.anneal_end - self.anneal_start
        left = (self.anneal_end - progress) / span if span else float(progress < self.anneal_end)
        self._randomness.fill_(min(1.0, max(0.0, left)))

    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token: in training in an order of each sample's own, else in raster order.

        Args:
            codes: `[B, N]`.
            condition: classes `[B]`.
            noise: `[B, 1 + N]` in [0, 1): whether the order is random, and what it is sorted by.
        """
        if not self.training:
            return super().loss(codes, condition)
        order = self._orders(torch.rand(len(codes), self.noise_size, device=codes.device) if noise is None else noise)
        permuted, slots = codes.long().gather(1, order), slice(0, self.plan.n_slots)
        x = self._embed(permuted, condition, slots, order)
        logits = self._head(self._pass(x, condition, slots, None, masked=True), 0, self.plan.n_units)
        return {"loss": F.cross_entropy(logits.float().flatten(0, 1), permuted.flatten())}

    def _orders(self, noise: Tensor) -> Tensor:
        """Order `[B, N]` of each sample from `noise [B, 1 + N]`."""
        random, raster = noise[:, :1] < self._randomness, self._raster.on(noise.device)
        return torch.where(random, noise[:, 1:].argsort(dim=1), raster)

    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        return self._embed(codes, condition, slots, self._raster.on(codes.device))

    def _embed(self, codes: Tensor, condition: Tensor, slots: slice, order: Tensor) -> Tensor:
        """Inputs `[B, L, C]` of slots from `codes [B, N]` that already are in the order `[B, N]` or `[N]`."""
        x = self.tokens(codes[:, max(slots.start - _PREFIX, 0) : slots.stop - _PREFIX])
        if slots.start == 0:
            x = torch.cat((self.start.expand(len(codes), 1, -1), self._classes(condition)[:, None], x), dim=1)
        prefix = torch.arange(_PREFIX, device=order.device).expand(*order.shape[:-1], _PREFIX)
        rows = torch.cat((prefix, order + _PREFIX), dim=-1)  # slot s holds the token at row s, and aims at that of row s + 1
        aims = self.targets[rows[..., max(slots.start, 1) + 1 : slots.stop + 1]]
        if slots.start == 0:  # the start predicts nothing
            aims = F.pad(aims, (0, 0, 1, 0))
        return x + self.positions[rows[..., slots]] + aims

    def _classes(self, condition: Tensor) -> Tensor:
        """Embeddings `[B, C]` of classes, whose ids come after the codes and an id for "masked" that is never used."""
        return self.tokens(condition + self.vocab_size + 1)

    def _modulation(self, condition: Tensor, slots: slice) -> Tensor | None:
        return self._classes(condition)[:, None] + self.steps[slots]

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        return self.head(hidden[:, first - last :])
