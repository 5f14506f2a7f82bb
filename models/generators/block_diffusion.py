"""Block diffusion on codes: BD3-LM (arXiv:2503.09573), SDAR (arXiv:2510.06303), Fast-dLLM v2 (arXiv:2509.26328).

Blocks follow one another as tokens do in a next-token model; within a block tokens are hidden and revealed in any order.
Shapes: `B` batch, `N` tokens of an image in the order of their blocks, `U` tokens of a block, `L` slots of one pass, `C` width,
`V` vocabulary. Slots: `N` noisy ones (a code, or the mask with id `V`), then the class, then `N` clean ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import Fraction, PositiveInt
from .block_plan import block_plan
from .block_steps import BlockSteps
from .llama import llama_config
from .masking import LEAST, BlockMask, block_sizes, calmest_window, window_moments
from .next_token import NextToken


class BlockDiffusion(BlockSteps):
    """Masked diffusion within blocks, one block after the other, on LlamaGen's transformer.

    Args:
        vocab_size: number of codes `V`.
        num_classes: number of classes; one more row of the class table stands for "no class".
        grid: rows and columns of the tokens.
        n_tokens: number of tokens of a 1-D or multi-scale tokenizer.
        grids: of the scales of a multi-scale tokenizer.
        block: `chunks` of tokens in a row, whole `rows` of the grid, square `tiles` of it, or `scales`.
        block_size: tokens of a chunk, rows of a block, side of a tile; scales have their own sizes.
        dim: width `C`.
        layers: number of transformer blocks.
        heads: attention heads.
        positions: see `NextToken`; both streams share them.
        qk_norm: LayerNorm of each head's queries and keys.
        modulation: adaptive layer norm by the class besides its slot.
        multiple_of: see `NextToken`.
        shift: a slot predicts the next token of its block, and the clean slot before a block its first (after Fast-dLLM v2):
            what a next-token model does, so that one converts without loss. Else each predicts its own (BD3-LM, SDAR).
        weight: of the loss of a hidden token: `elbo` 1/t, or `mean`, the same for all (Fast-dLLM v2, MaskGIT).
        level: t drawn for each `block` (BD3-LM) or once for each `sample` (SDAR).
        window: t is uniform on it (BD3-LM's clipped schedule).
        adapt_window: at each validation take the window in which the losses of blocks vary least.
        complementary: train on the mask and on its complement, so that every token is predicted once; needs weight `mean`.
        token_dropout: rate on the input embeddings.
        resid_dropout: rate after each attention.
        ffn_dropout: rate after each feed-forward.
        drop_path: stochastic depth of the last transformer block, growing linearly from 0 at the first.

    Raises:
        ValueError: arguments that contradict each other, or blocks that do not fit the tokens.
    """

    exact = False
    window: Tensor

    def __init__(
        self,
        vocab_size: PositiveInt,
        num_classes: PositiveInt,
        grid: tuple[int, int] | None = None,
        n_tokens: PositiveInt | None = None,
        grids: Sequence[Sequence[PositiveInt]] | None = None,
        block: Literal["chunks", "rows", "tiles", "scales"] = "chunks",
        block_size: PositiveInt = 4,
        dim: PositiveInt = 768,
        layers: PositiveInt = 12,
        heads: PositiveInt = 12,
        positions: Literal["rotary", "rotary_class", "learned"] = "rotary",
        qk_norm: bool = False,
        modulation: Literal["none", "block", "shared"] = "none",
        multiple_of: PositiveInt = 256,
        shift: bool = False,
        weight: Literal["elbo", "mean"] = "elbo",
        level: Literal["block", "sample"] = "block",
        window: tuple[Fraction, Fraction] = (0.001, 1.0),
        adapt_window: bool = False,
        complementary: bool = False,
        token_dropout: Fraction = 0.1,
        resid_dropout: Fraction = 0.1,
        ffn_dropout: Fraction = 0.1,
        drop_path: Fraction = 0.0,
    ) -> None:
        low, high = window
        if not low <= high or not high:
            raise ValueError(f"a window from {low} to {high} is empty; give its lower end first")
        if complementary and weight != "mean":
            raise ValueError("complementary masks hide every token once, whatever t is; set weight to mean")
        config = llama_config(
            dim,
            layers,
            heads,
            qk_norm=qk_norm,
            modulation=modulation,
            multiple_of=multiple_of,
            resid_dropout=resid_dropout,
            ffn_dropout=ffn_dropout,
            drop_path=drop_path,
        )
        plan = block_plan(grid, n_tokens, grids, block, block_size)
        super().__init__(plan, vocab_size, num_classes, config, positions, shift, token_dropout)
        self.weight, self.level = weight, level
        self.adapt_window, self.complementary = adapt_window, complementary
        self.register_buffer("window", torch.tensor([max(low, LEAST), max(high, LEAST)]))
        self._blocks = BlockMask(block_sizes(self.plan.committed))
        self.noise_size = self._blocks.noise_size
        self._moments: Tensor | None = None

    def weights_from(self, model: nn.Module) -> dict[str, Tensor]:
        """Those of a block diffusion, or of a next-token model over the same tokens: the mask becomes the mean token."""
        weights = dict(model.state_dict())
        if isinstance(model, NextToken):
            weights["tokens.weight"] = torch.cat((weights["tokens.weight"], weights["tokens.weight"].mean(0, keepdim=True)))
        return weights | {"window": self.window.detach().clone()}

    def _denoise(self, codes: Tensor, hidden: Tensor, condition: Tensor) -> Tensor:
        """Cross-entropy `[B, N]` of codes `[B, N]` with some hidden (bool), both in order of the blocks; of the others too."""
        states = self._both_streams(codes, hidden, condition)
        return F.cross_entropy(self.head(states).float().transpose(1, 2), codes, reduction="none")

    def loss(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """In training the objective; else the bound of the negative log-likelihood, in nats per token."""
        noise = self._noise(codes) if noise is None else noise
        if not self.training:
            if self.adapt_window:
                self._observe(codes, condition, noise)
            return {"loss": self.token_nll(codes, condition, noise).mean()}
        self._moments = None  # those of the validation before
        ordered, levels = codes.long()[:, self._order.on(codes.device)], self._levels(noise)
        hidden = self._blocks.by_level(levels, noise)
        rate: Tensor | float = self.window.mean() if self.weight == "mean" else levels[:, self._blocks.of(codes.device)]
        if self.complementary:
            ordered, condition, hidden = ordered.repeat(2, 1), condition.repeat(2), torch.cat((hidden, ~hidden))
            rate = 0.5
        # By the expected share of hidden tokens, not the drawn one: then the mean over a batch is that over its parts.
        return {"loss": (self._denoise(ordered, hidden, condition) * hidden / rate).mean()}

    def token_nll(self, codes: Tensor, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of the bound `[B, N]`, nats: of each block m tokens are hidden and weigh k/m (see `BlockMask.by_count`)."""
        ordered = codes.long()[:, self._order.on(codes.device)]
        hidden, weight = self._blocks.by_count(self._noise(codes) if noise is None else noise)
        nll = self._denoise(ordered, hidden, condition) * hidden * weight
        return nll[:, self._layout_order.on(codes.device)]

    def _noise(self, codes: Tensor) -> Tensor:
        return torch.rand(len(codes), self.noise_size, device=codes.device)

    def _levels(self, noise: Tensor) -> Tensor:
        """t of each block, `[B, K]`, within the window."""
        drawn = noise[:, :1].expand(-1, self._blocks.count) if self.level == "sample" else self._blocks.spread(noise)
        low, high = self.window
        return low + (high - low) * drawn

    @torch.no_grad()
    def _observe(self, codes: Tensor, condition: Tensor, noise: Tensor) -> None:
        """Choose the window by the losses of the blocks of this validation so far."""
        ordered = codes.long()[:, self._order.on(codes.device)]
        levels = LEAST + (1 - LEAST) * self._blocks.spread(noise)
        hidden = self._blocks.by_level(levels, noise)
        nll = self._blocks.sums(self._denoise(ordered, hidden, condition) * hidden) / levels
        moments = window_moments(levels, nll / self._blocks.sums(torch.ones_like(noise[:, : ordered.shape[1]])))
        self._moments = moments if self._moments is None else self._moments + moments
        self.window.copy_(calmest_window(self._moments))
