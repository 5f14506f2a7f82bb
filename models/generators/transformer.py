"""The one transformer behind all generators: pre-norm blocks with few, named switches.

Shapes: `B` batch, `L` slots, `C` width. A family is a choice of switches; a new switch value is one entry in a table here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..attention import Attention, Context
from ..layers import RMSNorm, SwiGLU, drop_path, swiglu_hidden


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a `Transformer`.

    Args:
        dim: width `C`.
        layers: number of blocks.
        heads: attention heads; must divide `dim`.
        norm: `rms` (LlamaGen: eps 1e-5, with weight).
        mlp: `swiglu`.
        multiple_of: the hidden width of a SwiGLU is rounded up to a multiple of this.
        resid_dropout: rate after the attention's output projection.
        ffn_dropout: rate after the feed-forward.
        drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
    """

    dim: int
    layers: int
    heads: int
    norm: Literal["rms"] = "rms"
    mlp: Literal["swiglu"] = "swiglu"
    multiple_of: int = 256
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


NORMS: dict[str, Callable[[TransformerConfig], nn.Module]] = {"rms": lambda config: RMSNorm(config.dim)}
MLPS: dict[str, Callable[[TransformerConfig], nn.Module]] = {
    "swiglu": lambda config: SwiGLU(config.dim, swiglu_hidden(config.dim, config.multiple_of), config.ffn_dropout)
}


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed input and added back."""

    def __init__(self, config: TransformerConfig, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm1 = NORMS[config.norm](config)
        self.attention = Attention(config.dim, config.heads, config.resid_dropout)
        self.norm2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`."""
        x = x + drop_path(self.attention(self.norm1(x), context, layer), self.drop_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_rate, self.training)


class Transformer(nn.Module):
    """A stack of blocks and a final norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        last = max(config.layers - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * index / last) for index in range(config.layers))
        self.norm = NORMS[config.norm](config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Hidden states `[B, L, C]` of input embeddings `[B, L, C]`, normed for the head."""
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        return self.norm(x)
