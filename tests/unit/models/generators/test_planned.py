"""The engine over every order, with a generator that knows nothing of any family."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.models.generators.base import Generator
from tokar.models.generators.orders import cells, diagonals, next_token, parallel, raster, scales, sequence
from tokar.models.generators.plan import Plan
from tokar.models.generators.planned import PlannedGenerator
from tokar.models.generators.transformer import TransformerConfig
from tokar.models.samplers.decode import sample
from torch import Tensor, nn

VOCAB, CLASSES, WIDTH = 7, 3, 16


class AnyOrder(PlannedGenerator):
    """A slot holds its token, or the sum of all tokens that are revealed before it; heads are averaged over who predicts."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(0)
        super().__init__(plan, VOCAB, CLASSES, TransformerConfig(WIDTH, 2, 2, multiple_of=16, modulation="block"))
        heads = len(plan.predicts[0])
        self.tokens, self.classes = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CLASSES + 1, WIDTH)
        self.slots, self.heads = nn.Parameter(torch.randn(plan.n_slots, WIDTH)), nn.Linear(WIDTH, heads * VOCAB)
        before = [[float(plan.revealed_at[token] < unit) for token in range(plan.n_tokens)] for unit in plan.unit]
        itself = [[float(token == held) for token in range(plan.n_tokens)] for held in plan.holds]
        self.seen = torch.tensor(
            [own if held >= 0 else past for own, past, held in zip(itself, before, plan.holds, strict=True)]
        )
        by = torch.tensor([[[float(said == token) for said in heads] for heads in plan.predicts] for token in plan.perm])
        self.share = by / by.sum((1, 2), keepdim=True)
        self.eval()

    def _fill(self, codes: Tensor, condition: Tensor, slots: slice, carry: Tensor | None) -> Tensor:
        return self.seen[slots] @ self.tokens(codes) + self.slots[slots] + self.classes(condition)[:, None]

    def _head(self, hidden: Tensor, first: int, last: int) -> Tensor:
        tokens = slice(self.plan.committed[first], self.plan.committed[last])
        slots = slice(self.plan.span(first).start, self.plan.span(last - 1).stop)
        said = self.heads(hidden).unflatten(-1, (-1, VOCAB))
        return torch.einsum("nsh,bshv->bnv", self.share[tokens, slots], said)

    def _modulation(self, condition: Tensor, slots: slice) -> Tensor | None:
        return self.classes(condition)[:, None] + self.slots[slots]


def plans() -> st.SearchStrategy[Plan]:
    side = st.integers(1, 4)
    grid, some = st.tuples(side, side), st.integers(1, 3)
    permuted = grid.flatmap(
        lambda grid: st.builds(
            next_token, st.just(cells(grid)), st.permutations(range(grid[0] * grid[1])).map(tuple), some, st.just(grid)
        )
    )
    regions = st.tuples(grid, st.integers(1, 2), st.integers(1, 2)).map(
        lambda drawn: parallel((drawn[0][0] * drawn[1], drawn[0][1] * drawn[2]), drawn[0])
    )
    return st.one_of(
        st.builds(raster, grid, some),
        st.builds(sequence, st.integers(1, 9), some),
        permuted,
        st.builds(diagonals, grid),
        regions,
        st.builds(scales, st.lists(grid, min_size=1, max_size=3)),
    )


def codes_of(plan: Plan, rows: int) -> Tensor:
    return torch.randint(VOCAB, (rows, plan.n_tokens), generator=torch.Generator().manual_seed(1))


@settings(max_examples=60, deadline=None)
@given(plan=plans())
@torch.no_grad()
def test_steps_with_a_cache_give_the_masked_pass(plan: Plan) -> None:
    generator, codes, condition = AnyOrder(plan), codes_of(plan, 2), torch.tensor([0, CLASSES])
    full, state = generator.logits(codes, condition), generator.begin(condition)
    for unit in range(plan.n_units):
        stepped, columns = generator.propose(state, unit), plan.columns(unit)
        torch.testing.assert_close(stepped, full[:, columns], atol=1e-5, rtol=0)
        for recompute in (AnyOrder.recompute, Generator.recompute):
            torch.testing.assert_close(recompute(generator, codes, condition, unit), stepped, atol=1e-5, rtol=0)
        generator.commit(state, unit, codes[:, columns])
    assert torch.equal(state.codes, codes)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), data=st.data())
@torch.no_grad()
def test_no_leak(plan: Plan, data: st.DataObject) -> None:
    """A changed code moves no logit of its own unit nor of an earlier one, and some logit of the next unit."""
    generator, codes, condition = AnyOrder(plan), codes_of(plan, 1), torch.tensor([1])
    token = data.draw(st.integers(0, plan.n_tokens - 1))
    changed = codes.clone()
    changed[0, token] = (codes[0, token] + 1) % VOCAB
    before, after = generator.logits(codes, condition), generator.logits(changed, condition)
    unit = plan.revealed_at[token]
    early = [other for other in range(plan.n_tokens) if plan.revealed_at[other] <= unit]
    torch.testing.assert_close(before[:, early], after[:, early], atol=1e-6, rtol=0)
    if unit + 1 < plan.n_units:
        later = list(plan.tokens(unit + 1))
        assert (before[:, later] - after[:, later]).abs().max() > 1e-5


@settings(max_examples=40, deadline=None)
@given(plan=plans(), data=st.data())
@torch.no_grad()
def test_rows_that_join_late_are_as_if_there_from_the_start(plan: Plan, data: st.DataObject) -> None:
    generator, codes = AnyOrder(plan), codes_of(plan, 2)
    late = data.draw(st.integers(0, plan.n_units - 1))
    state = generator.begin(torch.tensor([1]), capacity=2)
    for unit in range(late):
        generator.propose(state, unit)
        generator.commit(state, unit, codes[:1, plan.columns(unit)])
    generator.join(state, torch.tensor([CLASSES]), codes[1:], late)
    expected = generator.recompute(codes, torch.tensor([1, CLASSES]), late)
    torch.testing.assert_close(generator.propose(state, late), expected, atol=1e-5, rtol=0)
    generator.keep(state, 1)
    torch.testing.assert_close(generator.propose(state, late), expected[:1], atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(plan=plans(), start=st.floats(0, 1), stop=st.floats(0, 1))
def test_sampling_with_a_cache_is_sampling_without(plan: Plan, start: float, stop: float) -> None:
    generator, condition = AnyOrder(plan), torch.tensor([0, 2, 1])
    guidance = {"kind": "interval", "value": 3.0, "start": start, "stop": stop}
    cached, plain = (sample(generator, condition, seed=3, guidance=guidance, cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain)
