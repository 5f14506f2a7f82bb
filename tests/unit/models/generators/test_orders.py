from itertools import pairwise

import pytest
import torch
from tokar.models.generators.orders import (
    blocks,
    cells,
    chunks,
    diagonals,
    next_token,
    parallel,
    raster,
    raster_or_sequence,
    scale_blocks,
    scales,
    sequence,
    tiles,
)
from tokar.models.generators.plan import Plan, visible


def drawn(plan: Plan) -> list[str]:
    """The mask, a row of bits for each query."""
    return ["".join(str(int(bit)) for bit in row) for row in visible(plan)]


def test_scales_see_as_var_does() -> None:
    """Scales of 1, 2x2 and 1x3 tokens: all of a scale see each other and every coarser one (arXiv:2404.02905)."""
    plan = scales([(1, 1), (2, 2), (1, 3)])
    assert drawn(plan) == ["10000000"] + ["11111000"] * 4 + ["11111111"] * 3
    assert plan.coords[4:6] == ((1, 1, 1), (2, 0, 0))
    assert not plan.shift


def test_published_scales() -> None:
    plan = scales([(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
    level = torch.cat([torch.full((side * side,), index) for index, side in enumerate((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))])
    assert torch.equal(visible(plan), level[:, None] >= level[None])
    assert (plan.n_tokens, plan.n_units) == (680, 10)
    assert visible(plan).float().mean().item() == pytest.approx(0.62, abs=0.005)


def test_diagonals_see_as_nar_does() -> None:
    """2x3 tokens: class, 0, then 1 and 3, then 2 and 4; token 5, the last, is predicted and never fed (arXiv:2503.10696)."""
    plan = diagonals((2, 3))
    assert plan.holds == (-1, 0, 1, 3, 2, 4)
    assert plan.predicts == ((0, 0), (1, 3), (2, 4), (4, -1), (-1, 5), (5, -1))
    assert drawn(plan) == ["100000", "110000", "111100", "111100", "111111", "111111"]
    assert [plan.tokens(unit) for unit in range(plan.n_units)] == [(0,), (1, 3), (2, 4), (5,)]


def test_diagonals_of_a_square() -> None:
    """Published mask: in raster order a token sees those whose row + column is not above its own, and the class."""
    plan = diagonals((16, 16))
    place = torch.tensor(cells((16, 16)))[:-1].sum(dim=1)
    order = torch.tensor(plan.holds[1:])
    in_raster = torch.empty(255, 255, dtype=torch.bool)
    in_raster[order[:, None], order[None]] = visible(plan)[1:, 1:]
    assert torch.equal(in_raster, place[:, None] >= place[None])
    assert visible(plan)[:, 0].all()
    assert not visible(plan)[0, 1:].any()
    assert plan.n_units == 31


def test_groups_see_as_par_does() -> None:
    """4x4 tokens in 2x2 regions: four single tokens, then 4 at a time, at first with three fillers (arXiv:2412.15119)."""
    plan = parallel((4, 4), (2, 2))
    assert plan.holds == (-1, 0, 2, 8, 10, -1, -1, -1, 1, 3, 9, 11, 4, 6, 12, 14)
    assert plan.predicts == tuple((token,) for token in (0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15))
    single = ["1" + "0" * 15, "11" + "0" * 14, "111" + "0" * 13, "1111" + "0" * 12]
    assert drawn(plan) == single + ["1" * 8 + "0" * 8] * 4 + ["1" * 12 + "0" * 4] * 4 + ["1" * 16] * 4
    assert {plan.coords[slot] for slot in (0, 5, 6, 7)} == {(-1, -1)}
    assert plan.coords[8:12] == ((0, 1), (0, 3), (2, 1), (2, 3))


@pytest.mark.parametrize(("regions", "steps"), [((2, 2), 147), ((4, 4), 51)])
def test_published_steps_of_par(regions: tuple[int, int], steps: int) -> None:
    assert parallel((24, 24), regions).n_units == steps


def test_one_site_in_each_region_is_next_token() -> None:
    """No parallel step is left, so there are no fillers."""
    plan = parallel((2, 2), (2, 2))
    assert (plan.holds, plan.predicts) == ((-1, 0, 1, 2), ((0,), (1,), (2,), (3,)))
    assert plan.causal


def by_parts(block: list[int]) -> torch.Tensor:
    """BD3-LM's mask as it says it: block-diagonal, offset block-causal, block-causal; noisy tokens first (arXiv:2503.09573)."""
    count = len(block)
    rows = []
    for query in range(2 * count):
        q, noisy_query = block[query % count], query < count
        row = []
        for key in range(2 * count):
            k, noisy_key = block[key % count], key < count
            diagonal = q == k and noisy_query == noisy_key
            offset_causal = q > k and noisy_query and not noisy_key
            causal = q >= k and not noisy_query and not noisy_key
            row.append(diagonal or offset_causal or causal)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 12])
def test_blocks_see_as_bd3_lm_does(size: int) -> None:
    """The class apart: it is clean, comes first, and every slot sees it."""
    plan = blocks([(index,) for index in range(12)], chunks(12, size))
    tokens = [slot for slot in range(plan.n_slots) if slot != 12]
    mask = visible(plan)
    assert torch.equal(mask[tokens][:, tokens], by_parts([index // size for index in range(12)]))
    assert mask[:, 12].all()
    assert mask[12].nonzero().flatten().tolist() == [12]
    assert plan.coords[:12] == plan.coords[13:]
    assert not plan.shift


def test_tiles_see_as_acdit_does() -> None:
    """2x4 tokens in two tiles of 2x2: clean slots first, as ACDiT has them; written by hand (arXiv:2412.07720)."""
    plan = blocks(cells((2, 4)), tiles((2, 4), (2, 2)), (2, 4))
    assert plan.perm == (0, 1, 4, 5, 2, 3, 6, 7)
    clean_first = [*range(9, 17), *range(8)]
    mask = visible(plan)[clean_first][:, clean_first].int()
    clean = ["1111000000000000"] * 4 + ["1111111100000000"] * 4
    noisy = ["0000000011110000"] * 4 + ["1111000000001111"] * 4
    assert mask.tolist() == [[int(bit) for bit in row] for row in clean + noisy]
    assert plan.coords[4:8] == ((0, 2), (0, 3), (1, 2), (1, 3))


def test_cells_of_xar() -> None:
    """Four cells of 8x8 on 16x16 tokens: a clean slot sees its own cell and those before."""
    plan = blocks(cells((16, 16)), tiles((16, 16), (8, 8)), (16, 16))
    cell = torch.tensor([row // 8 * 2 + column // 8 for row, column in cells((16, 16))])
    order = torch.tensor(plan.perm)
    assert torch.equal(visible(plan)[257:, 257:], cell[order][:, None] >= cell[order][None])


def test_blocks_of_every_kind() -> None:
    assert chunks(5, 2) == [[0, 1], [2, 3], [4]]
    assert tiles((2, 2), (1, 2)) == [[0, 1], [2, 3]]
    assert scale_blocks([1, 4, 2]) == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_permuted_order_holds_the_token_before() -> None:
    plan = next_token(cells((2, 2)), (2, 0, 3, 1), prefix=2)
    assert (plan.holds, plan.predicts) == ((-1, -1, 2, 0, 3), ((-1,), (2,), (0,), (3,), (1,)))
    assert plan.coords[2:] == ((1, 0), (0, 0), (1, 1))
    assert plan.causal
    assert not plan.in_layout_order


@pytest.mark.parametrize(
    "plan",
    [raster((3, 4)), raster((3, 4), 3), sequence(5), diagonals((3, 5)), parallel((4, 6), (2, 3)), scales([(1, 1), (2, 3)])],
    ids=["raster", "long prefix", "sequence", "diagonals", "parallel", "scales"],
)
def test_spans_and_tokens_are_one_after_another(plan: Plan) -> None:
    spans = [plan.span(unit) for unit in range(plan.n_units)]
    assert spans[0].start == 0
    assert spans[-1].stop == plan.n_slots
    assert all(one.stop == other.start for one, other in pairwise(spans))
    assert [token for unit in range(plan.n_units) for token in plan.tokens(unit)] == list(plan.perm)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parallel((4, 6), (2, 4)), "2x4 regions do not divide a grid of 4x6"),
        (lambda: tiles((4, 6), (3, 2)), "blocks of 3x2 do not divide a grid of 4x6"),
        (lambda: raster_or_sequence(None, None), "exactly one of grid"),
        (lambda: raster_or_sequence((2, 2), 4), "exactly one of grid"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
