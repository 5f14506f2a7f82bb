"""A teacher whose joint distribution can be enumerated: every token depends on the two before it, by tables."""

import itertools
import math

import torch
from tokar.data.randoms import gaussian
from tokar.models.distill.dd2 import levels
from tokar.models.generators.base import Generator
from tokar.models.generators.orders import sequence
from torch.nn import functional as F


def normal(seed, *shape):
    """Noise that no generator's state stands behind."""
    return torch.from_numpy(gaussian(seed, [0], shape)[0])


def circle(vocab_size, radius=1.2):
    angles = torch.arange(vocab_size) * (2 * math.pi / vocab_size)
    return radius * torch.stack((angles.cos(), angles.sin()), dim=1)


class TableTeacher(Generator):
    """Rows of its tables are drawn from Dirichlet(0.25) + 0.01."""

    def __init__(self, vocab_size=4, n_tokens=4, seed=0):
        super().__init__()
        self.plan, self.vocab_size, self.num_classes = sequence(n_tokens), vocab_size, 1
        torch.manual_seed(seed)
        rows = torch.distributions.Dirichlet(torch.full((vocab_size,), 0.25)).sample((n_tokens, vocab_size, vocab_size)) + 0.01
        self.register_buffer("tables", (rows / rows.sum(-1, keepdim=True)).log())

    def logits(self, codes, condition):
        before = F.pad(codes.long(), (2, 0))[:, : codes.shape[1] + 1]
        place = torch.arange(codes.shape[1])
        return self.tables[place, before[:, :-1], before[:, 1:]]

    def loss(self, codes, condition, noise=None):
        return {"loss": self.token_nll(codes, condition).mean()}

    def begin(self, condition, *, capacity=None, compile=False):
        return State(condition, torch.zeros(len(condition), self.plan.n_tokens, dtype=torch.int64))

    def propose(self, state, unit):
        state.calls += 1
        return self.recompute(state.codes, state.condition, unit)

    def commit(self, state, unit, values):
        state.codes[:, self.plan.columns(unit)] = values

    def join(self, state, condition, codes, unit):
        state.condition, state.codes = torch.cat((state.condition, condition)), torch.cat((state.codes, codes))

    def keep(self, state, rows):
        state.condition, state.codes = state.condition[:rows], state.codes[:rows]

    def joint(self):
        """Probability of every sequence, `[V^n]` float64."""
        every = torch.tensor(list(itertools.product(range(self.vocab_size), repeat=self.plan.n_tokens)))
        return (-self.token_nll(every, every[:, 0]).double().sum(1)).exp()

    def share(self, codes):
        """How often each sequence occurs among `codes`, `[V^n]` float64."""
        weights = self.vocab_size ** torch.arange(self.plan.n_tokens - 1, -1, -1)
        count = self.vocab_size**self.plan.n_tokens
        return torch.bincount((codes * weights).sum(1), minlength=count).double() / len(codes)

    def independent(self):
        """The joint of tokens drawn one by one from how often they occur at their place: the best without dependence."""
        cells = self.joint().view(*[self.vocab_size] * self.plan.n_tokens)
        axes = range(self.plan.n_tokens)
        product = torch.ones((), dtype=torch.float64)
        for axis in axes:
            product = product[..., None] * cells.sum([other for other in axes if other != axis])
        return product.flatten()


class State:
    def __init__(self, condition, codes):
        self.condition, self.codes, self.calls = condition, codes, 0


def distance(first, second):
    """Total variation."""
    return float((first - second).abs().sum() / 2)


def floor(joint, count, seed=0):
    """Total variation of as many exact draws from what they are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(joint, count, replacement=True, generator=generator)
    return distance(torch.bincount(drawn, minlength=len(joint)).double() / count, joint)


def draw_levels(draws, like):
    """Noise levels `[M, B, N]` and noise `[M, B, N, D]` for tokens `[B, N, D]`, of torch's own generator."""
    return levels(torch.rand(draws, *like.shape[:2])), torch.randn(draws, *like.shape)
