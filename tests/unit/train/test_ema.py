import torch


def test_the_average_follows_its_formula(make_network, train):
    network = make_network()
    expected = [parameter.detach().clone() for parameter in network.module.parameters()]
    for step in range(5):
        train(network, 1, step)
        decay = min(0.9, (2 + step) / (11 + step))
        expected = [decay * a + (1 - decay) * w.detach() for a, w in zip(expected, network.module.parameters(), strict=True)]
    for average, value in zip(network.ema.shadow, expected, strict=True):
        torch.testing.assert_close(average, value)


def test_swapping_in_the_average_gives_the_weights_back_bitwise(make_network, train):
    network = make_network()
    train(network, 4)
    trained = {name: value.clone() for name, value in network.module.state_dict().items()}
    names = [name for name, _ in network.module.named_parameters()]
    averaged = trained | {name: value.clone() for name, value in zip(names, network.ema.shadow, strict=True)}
    with network.ema.applied():
        assert not torch.equal(network.module[0].weight, trained["0.weight"])
        assert all(torch.equal(value, averaged[name]) for name, value in network.module.state_dict().items())
    assert all(torch.equal(value, trained[name]) for name, value in network.module.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in zip(names, network.ema.shadow, strict=True))
