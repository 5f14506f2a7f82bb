import pytest
from tokar.conf.duration import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [(2000, 2000, "step"), ("2k steps", 2000, "step"), ("500k samples", 500_000, "sample"), ("3 epochs", 3, "epoch"),
     ("0.5epoch", 0.5, "epoch"), ("1M", 1e6, "step"), (1.5, 1.5, "step"), ("1e3 samples", 1000, "sample")],
)  # fmt: skip
def test_parses(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize("text", ["", "three epochs", "-1", "3 weeks", True, None, "k", [3], "1 2 steps"])
def test_refuses(text):
    with pytest.raises(ValueError, match="is not a duration; write"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7", 7), ("64 samples", 4), ("65 samples", 5), ("1 epoch", 7), ("2 epochs", 13), ("0.5 epochs", 4), (0, 0)],
)
def test_counts_steps_of_16_on_100_samples_rounded_up(text, steps):
    assert Duration.parse(text).steps(batch_size=16, dataset_size=100) == steps


def test_says_itself():
    assert [str(Duration.parse(text)) for text in ("1", "2k steps", "1 epoch")] == ["1 step", "2000 steps", "1 epoch"]
