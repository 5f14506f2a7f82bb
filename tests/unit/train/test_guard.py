import json
import math
from types import SimpleNamespace

import pytest
import torch
from tokar.conf.spine import Guard as GuardConfig
from tokar.conf.spine import Optim
from tokar.models.tokenizers.quantizers.vq import VectorQuantizer
from tokar.train.clock import Clock
from tokar.train.guard import FLOOR, HORIZON, Guard
from tokar.train.network import Trainable, Update
from tokar.train.scaler import LossScaler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

NAN = float("nan")


@pytest.fixture
def make_guard(make_network, workers):
    def make(delay=0, **config):
        return Guard(GuardConfig(**config), {"net": make_network()}, workers, delay)

    return make


def at(step):
    return Clock(step, step * 8, 1000, 8, 100)


def advance(guard, losses, start=1, stop=(), gradients=()):
    """Steps with these losses, numbered from `start`; which were judged bad. `gradients`: where one is not finite."""
    bad = []
    for step, loss in enumerate(losses, start):
        guard.begin()
        veto = guard.judge(torch.tensor(loss), stop=step in stop)
        results = {"net": Update(torch.tensor(1.0), veto | torch.tensor(step in gradients))}
        bad.append(bool(guard.conclude(at(step), results)))
    return bad


def everything(guard, step=1000):
    return guard.read(at(step), everything=True)


@pytest.mark.parametrize("loss", [NAN, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_bad_from_the_first_step(make_guard, loss):
    guard = make_guard()
    assert advance(guard, [loss, 1.0, loss]) == [True, False, True]
    first, second = everything(guard).bad
    assert (first.clock.step, first.row, second.clock.step, second.row) == (1, 1, 3, 1)
    assert first.reason == f"the loss is {loss}"


def test_a_gradient_that_is_no_number_is_bad_though_the_loss_is_one(make_guard):
    guard = make_guard()
    assert advance(guard, [1.0, 1.0, 1.0], gradients=[2]) == [False, True, False]
    (verdict,) = everything(guard).bad
    assert verdict.reason == "the gradient of the net is not finite"
    assert guard.state[0] == 2  # it is not counted among the good


def test_the_mean_and_the_spread_are_those_of_the_good_steps(make_guard):
    losses = torch.rand(40, dtype=torch.float64)
    guard = make_guard()
    advance(guard, [*losses[:20].tolist(), NAN, *losses[20:].tolist()])
    good, mean, variance, row = guard.state
    assert (good, row) == (40, 0)
    torch.testing.assert_close(mean, losses.mean())
    torch.testing.assert_close(variance, losses.var(correction=0))


def test_the_mean_forgets(make_guard):
    guard = make_guard()
    advance(guard, [1.0] * (2 * HORIZON) + [3.0] * HORIZON)
    assert guard.state[1] == pytest.approx(3 - 2 * (1 - 1 / HORIZON) ** HORIZON, rel=1e-9)


def test_a_spike_is_skipped_after_the_warm_up_and_leaves_the_mean_alone(make_guard):
    calm = [1.0, 1.2] * 10
    guard = make_guard(spike=5.0, warmup=20)
    assert not any(advance(guard, [*calm[:-1], 9.0]))  # the twentieth step: none is told yet
    guard = make_guard(spike=5.0, warmup=20)
    advance(guard, calm)
    before = guard.state.clone()
    assert advance(guard, [1.1 + 5 * 0.1 + 0.01, 1.1 + 5 * 0.1 - 0.01, -50.0], start=21) == [True, False, False]
    (verdict,) = everything(guard).bad
    assert verdict.reason == "the loss 1.61 is 5.1 spreads above its mean 1.1"
    assert verdict.skipped == ("net",)
    assert guard.state[0] == before[0] + 2


def test_no_spike_is_told_without_the_key(make_guard):
    guard = make_guard(warmup=2)
    assert not any(advance(guard, [1.0] * 50 + [1e6]))


def test_a_loss_that_hardly_moves_has_a_floor_for_its_spread(make_guard):
    for spreads in (4.9, 5.1):
        *_, bad = advance(make_guard(spike=5.0, warmup=10), [2.0] * 10 + [2.0 * (1 + spreads * FLOOR)])
        assert bad == (spreads > 5)
    assert not any(advance(make_guard(spike=5.0, warmup=2), [0.0] * 5))


def test_too_many_in_a_row_trip_and_one_good_step_begins_anew(make_guard):
    guard = make_guard(patience=3)
    advance(guard, [NAN, NAN, 1.0, NAN, NAN])
    assert everything(guard).trip is None
    advance(guard, [NAN], start=6)
    trip = everything(guard).trip
    assert (trip.clock.step, trip.row) == (6, 3)


def test_ways_back_count_until_a_good_step_beyond_the_place(make_guard):
    guard = make_guard(rollbacks=1)
    guard.go_back(at(6), None)
    assert guard.gives_up
    advance(guard, [1.0, NAN, 1.0], start=4)
    everything(guard)
    assert guard.gives_up
    advance(guard, [1.0], start=7)
    everything(guard)
    assert not guard.gives_up


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("loss", [1.0, NAN])
def test_a_codebook_that_a_forward_moved_is_put_back_when_the_step_is_left_out(workers, loss, scaled):
    """Also where a loss scale answers the gradient, as in fp16."""
    quantizer = VectorQuantizer(16, 4, restart_after=1)
    quantizer.steps_unused.fill_(1)
    network = workers.wrap({"net": Trainable(quantizer, {}, Optim(lr=1e-2))}, None)["net"]
    network.scaler = LossScaler(workers.device) if scaled else None
    guard = Guard(GuardConfig(), {"net": network}, workers)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    guard.begin()
    found = network(torch.randn(2, 4, 3, 3))
    assert not torch.equal(quantizer.codebook, before["codebook"])
    network.backward(found.losses["codebook"] * loss)
    update = network.step(1.0, veto=guard.judge(torch.tensor(loss), stop=False))
    guard.conclude(at(1), {"net": update})
    same = [torch.equal(value, before[name]) for name, value in quantizer.state_dict().items()]
    assert all(same) if math.isnan(loss) else not any(same)


def test_deciding_reads_no_value_from_the_device(workers):
    with FakeTensorMode():  # tensors without values: whatever asks for one fails
        network = SimpleNamespace(module=nn.BatchNorm1d(4), remember=lambda: None)
        guard = Guard(GuardConfig(spike=3.0), {"net": network}, workers)
        for step in (1, 2):
            guard.begin()
            veto = guard.judge(torch.ones(()), stop=True)
            bad = guard.conclude(at(step), {"net": Update(torch.ones(()), veto.float())})
            assert isinstance(bad, FakeTensor)


def test_late_verdicts_are_read_two_steps_later_and_all_at_once_when_something_is_up(make_guard):
    guard = make_guard(delay=2, patience=2)
    seen = []
    for step, loss in enumerate([1.0, NAN, 1.0, 1.0, 1.0], 1):
        advance(guard, [loss], start=step)
        seen.append([verdict.clock.step for verdict in guard.read(at(step), everything=False).bad])
    assert seen == [[], [], [], [2], []]
    advance(guard, [NAN, NAN, NAN], start=6)
    assert guard.read(at(8), everything=False).trip is None  # of step 6, the first bad one
    advance(guard, [1.0], start=9)
    findings = guard.read(at(9), everything=False)
    assert [verdict.clock.step for verdict in findings.bad] == [7, 8]
    assert findings.trip.clock.step == 8
    assert guard.read(at(9), everything=True).bad == []


def test_the_wish_to_stop_is_read_with_its_step(make_guard):
    guard = make_guard(delay=2)
    stops = []
    for step in range(1, 6):
        advance(guard, [1.0], start=step, stop=[2])
        stops.append(guard.read(at(step), everything=False).stop)
    assert stops == [False, False, False, True, False]


def test_a_wish_to_stop_on_another_rank_and_its_part_of_the_loss_count(make_guard, workers, monkeypatch):
    guard = make_guard()
    monkeypatch.setattr(type(workers), "sum", lambda self, part: part + torch.tensor([NAN, 1.0]))
    assert advance(guard, [1.0]) == [True]
    assert everything(guard).stop


def test_a_checkpoint_carries_it(make_guard):
    guard, other = make_guard(), make_guard()
    other.restore(None)
    assert other.facts() == {"state": [0.0] * 4, "rollbacks": 0, "place": 0}
    advance(guard, [0.1, 0.3, NAN])
    guard.go_back(at(3), guard.facts())
    other.restore(json.loads(json.dumps(guard.facts())))
    assert other.facts() == guard.facts()
    assert other.facts()["state"] == [2, pytest.approx(0.2), pytest.approx(0.01), 0]
    assert other.facts()["place"] == 3


@pytest.mark.parametrize("poison", ["pixels", "gradient"])
def test_a_bad_step_changes_neither_weights_nor_moments_nor_statistics(make_network, workers, poison):
    network = make_network()
    guard = Guard(GuardConfig(), {"net": network}, workers)

    def step(number, bad):
        torch.manual_seed(number)
        images = torch.randn(16, 4)
        guard.begin()
        output = network(images * NAN if bad and poison == "pixels" else images)
        loss = output.square().mean()
        network.backward(loss)
        if bad and poison == "gradient":
            next(network.module.parameters()).grad[0, 0] = math.inf
        result = network.step(1.0, veto=guard.judge(loss.detach(), stop=False))
        return bool(guard.conclude(at(number), {"net": result}))

    def state():
        moments = [value for each in network.optimizer.state.values() for value in each.values()]
        return [value.clone() for value in [*network.module.state_dict().values(), *moments]]

    assert not step(1, bad=False)
    before = state()
    assert step(2, bad=True)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert not step(3, bad=False)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(value.isfinite().all() for value in state())
