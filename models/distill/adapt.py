"""Next-token generators that read vectors in the place of codes (Distilled Decoding 2, arXiv:2510.21003).

Shapes: `B` batch, `L` slots, `D` code width, `C` width, `V` codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ranges import PositiveInt
from ..generators.next_token import NextToken
from ..layers import init_normal


class VectorEmbedding(nn.Module):
    """A table of tokens as a function of their code vectors, `down(gelu(up x))`: it reads codes, and vectors between them.

    Args:
        vocab_size: number of codes `V`.
        embed_dim: code width `D`.
        dim: width `C`.
        hidden: width of the hidden layer.
    """

    codebook: Tensor

    def __init__(self, vocab_size: int, embed_dim: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(embed_dim, hidden), nn.Linear(hidden, dim)
        self.register_buffer("codebook", torch.zeros(vocab_size, embed_dim))
        init_normal(self.up, std=0.5 * embed_dim**-0.5)
        init_normal(self.down)

    def forward(self, values: Tensor) -> Tensor:
        """Embeddings `[B, L, C]` of codes `[B, L]` or vectors `[B, L, D]`."""
        vectors = values if values.is_floating_point() else F.embedding(values, self.codebook)
        return self.down(F.gelu(self.up(vectors.to(self.up.weight.dtype))))


def continuous(teacher: nn.Module, embed_dim: PositiveInt, hidden: PositiveInt = 1024) -> NextToken:
    """A `NextToken` whose table of tokens is replaced, in place, by a `VectorEmbedding`; set its `codebook` before use.

    First fit the embedding by `embedding_loss`, then train the whole as any generator (the paper: 200,000 steps).

    Args:
        teacher: a `NextToken`.
        embed_dim: code width.
        hidden: see `VectorEmbedding`.

    Raises:
        ValueError: another generator, or one that reads vectors already.
    """
    if not isinstance(teacher, NextToken) or not isinstance(teacher.tokens, nn.Embedding):
        raise ValueError(f"a {type(teacher).__name__} has no table of tokens; take a NextToken as it is published")
    dim = teacher.transformer.config.dim
    teacher.tokens = VectorEmbedding(teacher.vocab_size, embed_dim, dim, hidden)  # type: ignore[assignment]
    return teacher


def embedding_loss(embedding: VectorEmbedding, table: Tensor) -> Tensor:
    """`mean_i |mlp(c_i) - e_i|²` between the embeddings of all codes and the `table [V, C]` that they are to replace."""
    every = torch.arange(len(table), device=table.device)
    return (embedding(every[None])[0] - table).square().sum(-1).mean()


def fit_embedding(embedding: VectorEmbedding, table: Tensor, codebook: Tensor, steps: int = 1000, lr: float = 3e-3) -> Tensor:
    """Make an embedding say what `table [V, C]` says of the codes of `codebook [V, D]`; returns the loss that is left."""
    embedding.codebook.copy_(codebook)
    optimizer = torch.optim.Adam(embedding.parameters(), lr=lr)
    loss = embedding_loss(embedding, table)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = embedding_loss(embedding, table)
        loss.backward()
        optimizer.step()
    return loss.detach()
