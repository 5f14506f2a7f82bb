"""How much the tokens of an image know of each other: what a model loses that draws them apart.

Shapes: `N` samples, `T` tokens of an image, `V` codebook, `D` code width, `G` groups of codes.
Likelihood alone does not show it, and can be gamed by drawing few images again and again: it stands beside the number of
distinct codes and the information that pairs of tokens share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.tokenizers.quantizers.codebook import kmeans


def distinct(codes: Tensor) -> int:
    """How many different codes occur in `[N, T]`."""
    return len(codes.unique())


def groups_of(codebook: Tensor, groups: int) -> Tensor:
    """The group `[V]` of each code of `codebook [V, D]`: k-means from the codes farthest apart.

    Pairs of codes are too many to count (256² cells for 2,000 images); pairs of groups are not.
    """
    vectors = codebook.detach().float().cpu()
    centres = vectors[:1]
    while len(centres) < min(groups, len(vectors)):
        farthest = torch.cdist(vectors, centres).amin(1).argmax()
        centres = torch.cat((centres, vectors[farthest, None]))
    with torch.random.fork_rng(devices=[]):
        centres = kmeans(vectors, centres, torch.tensor(1), 2, False)
    return torch.cdist(vectors, centres).argmin(1)


def pair_information(groups: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mutual information `[T, T]` of each pair of tokens given the class, nats: `H(i) + H(j) - H(i, j)` of what was counted.

    Counting makes it too high, by up to about `(G - 1)²/2n` for `n` samples of a class; see `beyond_chance`.

    Args:
        groups: `[N, T]`, the group of each token's code.
        labels: `[N]`.
        count: groups `G`.
    """
    tokens, total = groups.shape[1], groups.new_zeros(groups.shape[1], groups.shape[1], dtype=torch.float64)
    for label in labels.unique():
        rows = torch.nn.functional.one_hot(groups[labels == label], count).double().flatten(1)
        joint = (rows.t() @ rows / len(rows)).view(tokens, count, tokens, count)
        both = -torch.xlogy(joint, joint).sum((1, 3))
        alone = both.diagonal()
        total += (alone[:, None] + alone - both) * (len(rows) / len(labels))
    return total


def beyond_chance(groups: Tensor, labels: Tensor, count: int, shuffles: int = 8) -> Tensor:
    """`pair_information` less what counting finds in tokens that know nothing of each other, `[T, T]`, nats.

    That is its mean over `shuffles` in which every token is exchanged among the samples of its class, which keeps how often
    each group occurs. The shuffles are always the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    chance = torch.zeros(groups.shape[1], groups.shape[1], dtype=torch.float64)
    for _ in range(shuffles):
        mixed = groups.clone()
        for label in labels.unique():
            rows = (labels == label).nonzero()[:, 0]
            order = torch.rand(len(rows), groups.shape[1], generator=generator).argsort(0)
            mixed[rows] = groups[rows].gather(0, order)
        chance += pair_information(mixed, labels, count) / shuffles
    return pair_information(groups, labels, count) - chance


def over_pairs(values: Tensor) -> float:
    """Mean of `[T, T]` over the pairs of different tokens."""
    first, second = torch.triu_indices(len(values), len(values), offset=1)
    return float(values[first, second].mean())
