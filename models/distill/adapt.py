"""Next-token generators that read vectors in the place of codes (Distilled Decoding 2, arXiv:2510.21003).

Shapes: `B` batch, `L` slots, `D` code width, `C` width, `V` codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

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

    Then `inherit` the weights of one that was trained, and train the whole as any generator (the paper: 200,000 steps).

    Args:
        teacher: a `NextToken`.
        embed_dim: code width.
        hidden: see `VectorEmbedding`.

    Raises:
        ValueError: another generator, or one that reads vectors already.
    """
    if not reads_codes_alone(teacher):
        raise ValueError(f"a {type(teacher).__name__} has no table of tokens; take a NextToken as it is published")
    dim = teacher.transformer.config.dim
    teacher.tokens = VectorEmbedding(teacher.vocab_size, embed_dim, dim, hidden)  # type: ignore[assignment]
    return teacher


def reads_codes_alone(teacher: nn.Module) -> TypeGuard[NextToken]:
    """Whether it is a next-token generator that has to be made `continuous` first."""
    return isinstance(teacher, NextToken) and isinstance(teacher.tokens, nn.Embedding)


def continuous_node(node: Mapping[str, Any], embed_dim: int, hidden: int) -> dict[str, Any]:
    """The node of what `continuous` makes of the generator of `node`."""
    return {"_target_": f"{__name__}.continuous", "teacher": dict(node), "embed_dim": embed_dim, "hidden": hidden}


def inherit(model: nn.Module, teacher: nn.Module, codebook: Tensor, steps: int = 1000) -> None:
    """Give a model the teacher's weights, as far as it has them; a new `VectorEmbedding` is fitted to the teacher's table.

    Args:
        model: of the teacher's shape, perhaps with another embedding, perhaps without its head.
        teacher: that was trained.
        codebook: `[V, D]`.
        steps: see `fit_embedding`.
    """
    own = model.state_dict()
    model.load_state_dict({**own, **{name: value for name, value in teacher.state_dict().items() if name in own}})
    if isinstance(tokens := getattr(model, "tokens", None), VectorEmbedding) and reads_codes_alone(teacher):
        fit_embedding(tokens, teacher.tokens.weight.detach(), codebook, steps)


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
