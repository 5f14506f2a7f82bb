import math

import pytest
import torch
from tokar.errors import UserError
from tokar.models.generators.orders import sequence
from tokar.models.generators.plan import Plan
from tokar.models.samplers.guidance import Schedule, combine, parse_schedule

SCALES = Plan(  # three units of 1, 3 and 4 tokens
    perm=tuple(range(8)),
    unit=(0, 1, 1, 1, 2, 2, 2, 2),
    holds=(-1,) * 8,
    predicts=tuple((token,) for token in range(8)),
    coords=tuple((token,) for token in range(8)),
)


def test_combine_is_the_stored_convention() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert combine(conditional, unconditional, 2.0).item() == 5.0
    assert combine(conditional, unconditional, 1.0).item() == 3.0
    assert combine(conditional, unconditional, 0.0).item() == 1.0
    t = 0.7  # VAR's way to say it
    torch.testing.assert_close(combine(conditional, unconditional, 1 + t), (1 + t) * conditional - t * unconditional)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, [2, 2, 2, 2]),
        ({"kind": "linear", "value": 3}, [1, 1.5, 2, 2.5]),
        ("1.2,8.0", [1.2, 2.9, 4.6, 6.3]),
        ({"kind": "cosine", "value": 3.0}, [1, 2 - math.cos(math.pi / 4), 2, 2 - math.cos(3 * math.pi / 4)]),
        ("power_cosine:16,power=2.75", [1 + 7.5 * (1 - math.cos(math.pi * (i / 4) ** 2.75)) for i in range(4)]),
        ("step:1.75,start=0.26", [1, 1, 1.75, 1.75]),
        ({"kind": "step", "value": 1.75, "start": 0.25}, [1, 1.75, 1.75, 1.75]),
        ({"kind": "interval", "value": 4, "stop": 0.5}, [4, 4, 1, 1]),
        ({"kind": "ramp", "value": 4}, [1, 2, 3, 4]),
    ],
)
def test_schedules_over_four_tokens(given: object, expected: list[float]) -> None:
    assert parse_schedule(given).over(sequence(4)) == pytest.approx(expected)


def test_tokens_and_units_count_differently() -> None:
    """VAR ramps over scales; the others over tokens."""
    assert parse_schedule("ramp:2.5").over(SCALES) == pytest.approx([1, 1.75, 2.5])
    assert parse_schedule("linear:2.5").over(SCALES) == pytest.approx([1, 1 + 1.5 / 8, 1.75])
    assert parse_schedule("ramp:2.5").over(sequence(1)) == [1.0]


def test_forms_agree() -> None:
    expected = Schedule("step", 1.75, start=0.18)
    assert parse_schedule({"kind": "step", "value": "1.75", "start": 0.18}) == expected
    assert parse_schedule("step:1.75,start=0.18") == expected
    assert parse_schedule(expected) == expected
    assert parse_schedule("2") == parse_schedule(2.0) == parse_schedule({"value": 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("stp:2", "guidance.kind: no schedule 'stp'; did you mean 'step'"),
        ({"kind": "step", "value": 2, "strat": 0.1}, "no 'strat'; did you mean 'start'"),
        ({"kind": "step"}, "needs a value"),
        ("fast", "'fast' is not a number"),
        ("step:2,start=x", "guidance.start: 'x' is not a number"),
        (float("nan"), "not a number"),
        ([1, 2], "not a number"),
    ],
)
def test_mistakes_get_one_line(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_schedule(given)
    assert "\n" not in str(caught.value)
