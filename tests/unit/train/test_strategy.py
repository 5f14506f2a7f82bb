import pytest
import torch
from tokar.conf.spine import Strategy
from tokar.errors import UserError
from tokar.train.scaler import LossScaler
from tokar.train.strategy import Workers


def test_no_step_without_a_gradient(make_network):
    network = make_network()
    before = [parameter.clone() for parameter in network.module.parameters()]
    assert network.step(1.0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, network.module.parameters(), strict=True))


def test_weighted_micro_batches_make_the_gradient_of_the_whole_batch(make_network, workers):
    x = torch.randn(12, 4)
    grads = []
    for parts in ([12], [5, 4, 3]):
        network = make_network()
        network.module.eval()  # batch norm sees the batch; everything else here is a mean over samples
        for number, part in enumerate(x.split(parts), 1):
            with workers.micro_batch({"net": network}, len(part) / 12, last=number == len(parts)):
                network.backward(network(part).square().mean())
        grads.append([parameter.grad.clone() for parameter in network.module.parameters()])
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(whole, summed)


def test_the_gradient_is_clipped_and_its_norm_reported(make_network):
    network = make_network(clip=0.01)
    loss = 100 * network(torch.randn(16, 4)).square().mean()
    network.backward(loss)
    norm = torch.stack([p.grad.norm() for p in network.module.parameters()]).norm()
    gradients = [p.grad.clone() for p in network.module.parameters()]
    assert torch.allclose(network.step(1.0).norm, norm)
    seen = [network.optimizer.state[p]["exp_avg"] / 0.1 for p in network.module.parameters()]
    for whole, clipped in zip(gradients, seen, strict=True):
        torch.testing.assert_close(clipped, whole * 0.01 / norm)


def test_a_vetoed_or_senseless_step_changes_nothing_and_the_next_one_counts_as_the_first(make_network):
    network, other = make_network(), make_network()
    before = [p.detach().clone() for p in network.module.parameters()]
    x = torch.randn(16, 4)
    for factor, veto in ((1.0, torch.tensor(1.0)), (float("nan"), None), (float("inf"), torch.tensor(0.0))):
        network.backward(factor * network(x).square().mean())
        assert network.step(1.0, veto=veto).skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, network.module.parameters(), strict=True))
    network.module[1].load_state_dict(other.module[1].state_dict())  # batch statistics saw the batches
    for each in (network, other):
        each.backward(each(x).square().mean())
        assert each.step(1.0).skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(network.module.parameters(), other.module.parameters(), strict=True))


def test_fp16_answers_an_overflow_with_a_smaller_scale(make_network):
    network = make_network()
    network.scaler = LossScaler(torch.device("cpu"))
    start = float(network.scaler.scale)
    network.backward(float("inf") * network(torch.randn(16, 4)).square().mean())
    assert network.step(1.0).skipped == 0  # of the scale's doing, not of the data's
    assert float(network.scaler.scale) == start / 2
    plain = make_network()
    x = torch.randn(16, 4)
    network.module.load_state_dict(plain.module.state_dict())
    for each in (network, plain):
        each.backward(each(x).square().mean())
        each.step(1.0)
    for a, b in zip(network.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_vectors_are_not_decayed(make_network):
    network = make_network()
    decayed, others = network.optimizer.param_groups
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said():
    with pytest.raises(UserError, match=r"no GPU is visible; set strategy\.accelerator"):
        Workers(Strategy(accelerator="cuda"))
