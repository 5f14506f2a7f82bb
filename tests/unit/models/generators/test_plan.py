import dataclasses

import pytest
import torch
from tokar.errors import UserError
from tokar.models.generators.orders import raster, sequence
from tokar.models.generators.plan import Plan, visible
from tokar.models.tokenizers.layout import Stream, TokenLayout, raster_layout


def test_raster_slots_hold_the_code_before_and_sit_at_its_cell() -> None:
    plan = raster((2, 3))
    assert (plan.n_tokens, plan.n_units, plan.n_slots) == (6, 6, 6)
    assert plan.holds == (-1, 0, 1, 2, 3, 4)
    assert plan.coords == ((-1, -1), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert [plan.tokens(unit) for unit in range(6)] == [(token,) for token in range(6)]
    assert [plan.slots(unit) for unit in range(6)] == [(slot,) for slot in range(6)]
    assert plan.shift
    assert plan.causal
    assert plan.streams == 1
    assert plan.committed == (0, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "plan", [raster((2, 3)), sequence(6), raster((2, 3), prefix=4)], ids=["raster", "sequence", "long prefix"]
)
def test_next_token_masks_are_lower_triangles(plan: Plan) -> None:
    by_hand = [[key <= query for key in range(plan.n_slots)] for query in range(plan.n_slots)]
    assert visible(plan).tolist() == by_hand
    assert visible(plan) is visible(plan)


def test_prefix_slots_before_the_last_have_negative_units() -> None:
    plan = sequence(3, prefix=4)
    assert plan.unit == (-3, -2, -1, 0, 1, 2)
    assert plan.slots(0) == (3,)
    assert plan.coords == ((-1,), (-1,), (-1,), (-1,), (0,), (1,))


def test_units_of_several_slots_see_each_other() -> None:
    """Two scales of 1 and 4 tokens, as in next-scale prediction: slots predict their own token from something else."""
    plan = Plan(
        perm=(0, 1, 2, 3, 4),
        unit=(0, 1, 1, 1, 1),
        holds=(-1,) * 5,
        predicts=tuple((token,) for token in range(5)),
        coords=((0, 0), (0, 0), (0, 1), (1, 0), (1, 1)),
    )
    assert visible(plan).tolist() == [[True] + [False] * 4] + [[True] * 5] * 4
    assert not plan.causal
    assert not plan.shift
    assert plan.tokens(1) == (1, 2, 3, 4)
    assert plan.columns(1) == slice(1, 5)


def test_two_streams_see_as_block_diffusion_does() -> None:
    """Four tokens in blocks of two, noisy slots first: mask written by hand from arXiv:2503.09573, figure 3."""
    plan = Plan(
        perm=(0, 1, 2, 3),
        unit=(0, 0, 1, 1) * 2,
        holds=(0, 1, 2, 3) * 2,
        predicts=((0,), (1,), (2,), (3,)) + ((-1,),) * 4,
        coords=((0,), (1,), (2,), (3,)) * 2,
        stream=(1,) * 4 + (0,) * 4,
        cache_mode="append_on_commit",
    )
    rows = ["11000000"] * 2 + ["00111100"] * 2 + ["00001100"] * 2 + ["00001111"] * 2
    assert visible(plan).int().tolist() == [[int(bit) for bit in row] for row in rows]
    assert plan.streams == 2
    assert not plan.causal


def test_masked_noisy_block_one_is_causal() -> None:
    plan = dataclasses.replace(sequence(3), cache_mode="append_on_commit")
    assert plan.causal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perm": (0, 0, 2)}, "every token id once"),
        ({"unit": (0, 1)}, "must all describe"),
        ({"unit": (0, 2, 1)}, "must not decrease"),
        ({"predicts": ((0,), (1,), (1,))}, "token 2 is predicted by no slot"),
        ({"perm": (2, 1, 0)}, "in the order of the units"),
        ({"holds": (-1, 1, 0)}, "slot 1 of unit 1 holds token 1"),
    ],
)
def test_contradictions_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sequence(3), **change)


def test_check_against_a_layout() -> None:
    raster((4, 4)).check(raster_layout((4, 4), 8, 2, 4))
    sequence(16).check(raster_layout((4, 4), 8, 2, 4))
    raster((4, 4)).check(TokenLayout("sequence", (Stream("latent", 16, 8, 2),), (16, 16), 0))
    with pytest.raises(UserError, match=r"plan of 16 tokens, but the tokenizer makes 64"):
        raster((4, 4)).check(raster_layout((8, 8), 8, 2, 4))
    with pytest.raises(UserError, match=r"plan of a grid \(2, 8\), but the tokenizer's is \(4, 4\)"):
        raster((2, 8)).check(raster_layout((4, 4), 8, 2, 4))


def test_mask_made_while_sampling_can_be_trained_with() -> None:
    with torch.inference_mode():
        mask = visible(sequence(4))
    assert not mask.is_inference()
