import pytest
import torch
from tokar.conf.spine import Strategy
from tokar.errors import UserError
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
    network = make_network(clip=0.01, name="adam")
    loss = 100 * network(torch.randn(16, 4)).square().mean()
    network.backward(loss)
    norm = torch.stack([p.grad.norm() for p in network.module.parameters()]).norm()
    clipped = []
    network._stepper.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: clipped.append(torch.stack([p.grad.norm() for p in network.module.parameters()]).norm())
    )
    assert torch.allclose(network.step(1.0), norm)
    assert clipped[0] <= 0.0101


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
