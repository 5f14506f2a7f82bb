"""What a rank holds and sends, by hand: 1,000 elements in units of 300 and a rest of 100, four ranks."""

import pytest
from tokar.conf.spine import Strategy
from tokar.train.cost import Cost
from tokar.train.footprint import Size, footprint

SIZE = Size(trained=1000, averaged=1000, unit=300, rest=100)
COST = Cost(flops=0, frozen_flops=0, moments=((50_000, 0), (100, 1000)))
LATE = Cost(flops=0, frozen_flops=0, moments=((500, 0), (400, 1000)))
"""A step whose gradients take more than its activations."""


def paper(name, ranks=4, size=SIZE, cost=COST, accumulate=1, **more):
    strategy = Strategy(name=name, devices=ranks, accelerator="cpu", channels_last=name in ("single", "ddp"), **more)
    return footprint(strategy, ranks, [size], 64, cost, accumulate)


def test_one_device_holds_weights_moments_average_and_then_gradients():
    held = {"moments": 8000, "average": 4000, "weights": 4000, "frozen and buffers": 64}
    assert paper("single", 1).held == {**held, "activations": 50_000}
    assert paper("single", 1, cost=LATE).held == {**held, "activations": 400, "gradients": 4000}
    assert paper("single", 1).sent == 0


def test_ddp_holds_its_buckets_all_the_time():
    held = paper("ddp").held
    assert held == {"moments": 8000, "average": 4000, "weights": 4000, "gradients": 4000, "activations": 50_000,
                    "frozen and buffers": 64}  # fmt: skip
    assert paper("ddp").sent == 2 * 4000 * 3 / 4


def test_zero_cuts_moments_then_gradients_then_weights():
    one, two, three = (paper(name, bucket_mib=1).held for name in ("zero1", "zero2", "zero3"))
    for held in (one, two, three):
        assert (held["moments"], held["average"], held["masters"]) == (2000, 1000, 1000)
    assert (one["weights"], two["weights"], three["weights"]) == (4000, 4000, 1000)
    assert three["gathered weights"] == 4000  # all are needed again soon
    assert paper("zero2", cost=LATE).held["gradients"] == 1000 < paper("zero1", cost=LATE).held["gradients"] == 4000


def test_fsdp_gathers_the_rest_and_two_units():
    held = paper("fsdp").held
    assert (held["weights"], held["moments"], held["average"]) == (1000, 2000, 1000)
    assert held["gathered weights"] == 4 * (100 + 2 * 300)
    assert paper("fsdp", reshard=False).held["gathered weights"] == 4000


@pytest.mark.parametrize(
    ("name", "more", "passes"),
    [("ddp", {}, 2), ("zero1", {}, 2), ("zero2", {}, 4), ("fsdp", {}, 7), ("fsdp", {"reshard": False}, 4), ("zero3", {}, 9)],
)
def test_what_three_micro_batches_send(name, more, passes):
    assert paper(name, accumulate=3, **more).sent == passes * 4000 * 3 / 4


def test_a_network_that_is_differentiated_twice_is_not_sharded():
    twice = Size(trained=1000, averaged=0, unit=0, rest=1000, twice=True)
    assert paper("fsdp", size=twice).held == paper("ddp", size=twice).held
    assert paper("zero3", size=twice).held == paper("zero2", size=twice).held


def test_no_average_takes_nothing():
    assert "average" not in paper("ddp", size=Size(1000, 0, 300, 100)).held


def test_the_whole_is_the_sum():
    found = paper("zero3")
    assert found.total == sum(found.held.values())
