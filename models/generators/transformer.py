"""The one transformer behind all generators: pre-norm blocks with few, named switches.

Shapes: `B` batch, `L` slots, `C` width. A family is a choice of switches; a new switch value is one entry in a table here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention, Bias, Context, QKNorm
from ..layers import GELUFeedForward, RMSNorm, SwiGLU, Unit, drop_path, modulate, swiglu_hidden

Modulation = Literal["none", "block", "shared"]
Norm = Literal["rms", "layer", "plain"]
_GELU_RATIO = 4


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a `Transformer`.

    Args:
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads; must divide `dim`.
        norm: `rms` (LlamaGen: eps 1e-5, with weight), `layer` (RAR: LayerNorm, eps 1e-6), `plain` (VAR: that without weights).
        final_norm: before the head; `None`: as `norm`.
        mlp: `swiglu`, `gelu` (its tanh approximation), or `gelu_exact` (RAR; dropout on its hidden layer too).
        bias: of attention and feed-forward (a SwiGLU has none).
        qk_norm: of queries and keys.
        qk_eps: of their LayerNorm (RAR 1e-6, GigaTok 1e-5).
        attention_scale: of the scores; `None`: `1/sqrt(head width)`, or 1 with `qk_norm` `l2`.
        modulation: adaptive layer norm: a projection of the condition for each block, or a `shared` one to which each block
            adds its own vectors.
        multiple_of: the hidden width of a SwiGLU is rounded up to a multiple of this.
        hidden: width of the GELU's hidden layer; `None`: four times `dim`.
        attention_dropout: rate on the attention weights.
        resid_dropout: rate after the attention's output projection.
        ffn_dropout: rate after the feed-forward.
        drop_path: stochastic depth of the last block; grows linearly from 0 at the first.

    Raises:
        ValueError: the heads do not divide the width.
    """

    dim: int
    layers: int
    heads: int
    norm: Norm = "rms"
    final_norm: Norm | None = None
    mlp: Literal["swiglu", "gelu", "gelu_exact"] = "swiglu"
    bias: Bias = "none"
    qk_norm: QKNorm = "none"
    qk_eps: float = 1e-6
    attention_scale: float | None = None
    modulation: Modulation = "none"
    multiple_of: int = 256
    hidden: int | None = None
    attention_dropout: float = 0.0
    resid_dropout: float = 0.0
    ffn_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.dim}; choose dim a multiple of heads")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads


NORMS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "rms": lambda config: RMSNorm(config.dim),
    "layer": lambda config: nn.LayerNorm(config.dim, eps=1e-6),
    "plain": lambda config: nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False),
}
MLPS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "swiglu": lambda config: SwiGLU(config.dim, swiglu_hidden(config.dim, config.multiple_of), config.ffn_dropout),
    "gelu": lambda config: _gelu(config, exact=False),
    "gelu_exact": lambda config: _gelu(config, exact=True),
}


def _gelu(config: TransformerConfig, exact: bool) -> nn.Module:
    hidden = config.hidden or _GELU_RATIO * config.dim
    return GELUFeedForward(config.dim, hidden, config.bias != "none", config.ffn_dropout, exact)


class Block(Unit):
    """Attention, then feed-forward, on normed inputs and added back; modulated: `x + γ·f(norm(x)·(1 + scale) + shift)`."""

    def __init__(self, config: TransformerConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate, dim = drop_rate, config.dim
        self.norm1 = NORMS[config.norm](config)
        self.attention = Attention(
            dim, config.heads, config.resid_dropout, config.bias, config.qk_norm, config.attention_scale, config.qk_eps,
            config.attention_dropout,
        )  # fmt: skip
        self.norm2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.modulation = nn.Linear(dim, 6 * dim) if config.modulation == "block" else None
        self.offset = nn.Parameter(torch.randn(6, dim) * dim**-0.5) if config.modulation == "shared" else None

    def forward(
        self, x: Tensor, context: Context, layer: int, signal: Tensor | None = None, between: Tensor | None = None
    ) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`.

        Args:
            x: hidden states.
            context: of the attention.
            layer: index of this block.
            signal: of a modulated block: SiLU of the condition `[B, L or 1, C]`; shared: its six vectors `[B, L or 1, 6, C]`.
            between: `[B, L, C]`, added after the attention (one-step students).
        """
        if signal is None:
            x = x + self._drop(self.attention(self.norm1(x), context, layer))
            x = x if between is None else x + between
            return x + self._drop(self.mlp(self.norm2(x)))
        gate1, gate2, scale1, scale2, shift1, shift2 = self._six(signal).unbind(-2)
        x = x + self._drop(gate1 * self.attention(modulate(self.norm1(x), scale1, shift1), context, layer))
        x = x if between is None else x + between
        return x + self._drop(gate2 * self.mlp(modulate(self.norm2(x), scale2, shift2)))

    def _six(self, signal: Tensor) -> Tensor:
        """γ, γ, scale, scale, shift, shift of attention and feed-forward, `[B, L or 1, 6, C]` (VAR's order)."""
        if self.modulation is not None:
            return self.modulation(signal).unflatten(-1, (6, -1))
        assert self.offset is not None
        return signal + self.offset

    def _drop(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_rate, self.training)


class Transformer(nn.Module):
    """A stack of blocks and a final norm, all of them modulated or none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        last = max(config.layers - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * index / last) for index in range(config.layers))
        self.norm = NORMS[config.final_norm or config.norm](config)
        modulated = config.modulation != "none"
        self.shared = nn.Linear(config.dim, 6 * config.dim) if config.modulation == "shared" else None
        self.final = nn.Linear(config.dim, 2 * config.dim) if modulated else None

    def forward(self, x: Tensor, context: Context, condition: Tensor | None = None) -> Tensor:
        """Hidden states `[B, L, C]`, normed for the head.

        Args:
            x: input embeddings `[B, L, C]`.
            context: of the attention.
            condition: `[B, L or 1, C]`, what modulates; `None` where nothing does.
        """
        return self.finish(self.through(x, context, range(len(self.blocks)), self.signal(condition)), condition)

    def signal(self, condition: Tensor | None) -> Tensor | None:
        """What modulates the blocks, of a condition `[B, L or 1, C]`: see `Block.forward`."""
        active = None if condition is None else F.silu(condition)
        return active if self.shared is None else self.shared(active).unflatten(-1, (6, -1))

    def finish(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Hidden states `[B, L, C]` behind the last block, normed for the head."""
        if self.final is None or condition is None:
            return self.norm(x)
        scale, shift = self.final(F.silu(condition)).chunk(2, dim=-1)
        return modulate(self.norm(x), scale, shift)

    def through(self, x: Tensor, context: Context, layers: range, signal: Tensor | None = None) -> Tensor:
        """Hidden states `[B, L, C]` behind some of the blocks, not normed.

        Args:
            x: hidden states before them.
            context: of the attention.
            layers: indices of the blocks.
            signal: see `Block.forward`.
        """
        for layer in layers:
            x = self.blocks[layer](x, context, layer, signal)
        return x
