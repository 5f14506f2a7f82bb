"""Each block against its formula written out with plain numpy-like loops over branches, then the whole run."""

import pytest
import torch
from tokar.evaluate import inception
from tokar.evaluate.inception import BasicConv2d, FIDInception
from torch.nn import functional as F


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = FIDInception().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


@torch.no_grad()
def by_hand(conv: BasicConv2d, x: torch.Tensor) -> torch.Tensor:
    """The layer from its weights alone: `(conv(x) - mean) / sqrt(var + 0.001) * weight + bias`, negatives cut."""
    y = F.conv2d(x, conv.conv.weight, stride=conv.conv.stride, padding=conv.conv.padding)
    mean, var, weight, bias = (
        value.view(1, -1, 1, 1) for value in (conv.bn.running_mean, conv.bn.running_var, conv.bn.weight, conv.bn.bias)
    )
    return (((y - mean) / (var + 0.001).sqrt()) * weight + bias).clamp(min=0)


def chain(block, x, *names):
    for name in names:
        x = by_hand(getattr(block, name), x)
    return x


def pools(x):
    """Mean and maximum over the 3x3 neighbours that exist, one pixel at a time."""
    mean, most = torch.empty_like(x), torch.empty_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            near = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            mean[:, :, i, j], most[:, :, i, j] = near.mean((2, 3)), near.amax((2, 3))
    return mean, most


def double(prefix, count):
    return [f"{prefix}_{index}" for index in range(1, count + 1)]


def equal(block, x, *branches):
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.cat(branches, 1), rtol=1e-4, atol=1e-5)


def test_stem(network):
    x = torch.randn(1, 3, 43, 43)
    names = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
    with torch.no_grad():
        ours = network.Conv2d_2b_3x3(network.Conv2d_2a_3x3(network.Conv2d_1a_3x3(x)))
    torch.testing.assert_close(ours, chain(network, x, *names), rtol=1e-4, atol=1e-5)
    assert ours.shape == (1, 64, 19, 19)


def test_pools_do_not_count_their_padding():
    x = torch.randn(2, 3, 5, 6) - 5
    mean, most = pools(x)
    torch.testing.assert_close(inception.average_pool(x), mean)
    torch.testing.assert_close(inception.max_pool(x), most)


@pytest.mark.parametrize(("name", "channels"), [("5b", 192), ("5c", 256), ("5d", 288)])
def test_block_a(network, name, channels):
    block, x = getattr(network, f"Mixed_{name}"), torch.randn(1, channels, 5, 5)
    equal(
        block,
        x,
        chain(block, x, "branch1x1"),
        chain(block, x, "branch5x5_1", "branch5x5_2"),
        chain(block, x, *double("branch3x3dbl", 3)),
        chain(block, pools(x)[0], "branch_pool"),
    )


def test_block_b(network):
    block, x = network.Mixed_6a, torch.randn(1, 288, 7, 7)
    equal(block, x, chain(block, x, "branch3x3"), chain(block, x, *double("branch3x3dbl", 3)), F.max_pool2d(x, 3, stride=2))


@pytest.mark.parametrize(("name", "width"), [("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)])
def test_block_c(network, name, width):
    block, x = getattr(network, f"Mixed_{name}"), torch.randn(1, 768, 4, 4)
    assert block.branch7x7_1.conv.out_channels == width
    equal(
        block,
        x,
        chain(block, x, "branch1x1"),
        chain(block, x, *double("branch7x7", 3)),
        chain(block, x, *double("branch7x7dbl", 5)),
        chain(block, pools(x)[0], "branch_pool"),
    )


def test_block_d(network):
    block, x = network.Mixed_7a, torch.randn(1, 768, 5, 5)
    equal(
        block,
        x,
        chain(block, x, *double("branch3x3", 2)),
        chain(block, x, *double("branch7x7x3", 4)),
        F.max_pool2d(x, 3, stride=2),
    )


@pytest.mark.parametrize(("name", "channels", "pool"), [("7b", 1280, 0), ("7c", 2048, 1)])
def test_block_e_pools_by_mean_first_and_by_maximum_last(network, name, channels, pool):
    block, x = getattr(network, f"Mixed_{name}"), torch.randn(1, channels, 3, 3)
    three, deep = chain(block, x, "branch3x3_1"), chain(block, x, *double("branch3x3dbl", 2))
    equal(
        block,
        x,
        chain(block, x, "branch1x1"),
        chain(block, three, "branch3x3_2a"),
        chain(block, three, "branch3x3_2b"),
        chain(block, deep, "branch3x3dbl_3a"),
        chain(block, deep, "branch3x3dbl_3b"),
        chain(block, pools(x)[pool], "branch_pool"),
    )


def test_split_kernels_lie_as_in_the_port(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_2.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7c.branch3x3_2a.conv.weight"] == (384, 384, 1, 3)
    assert shapes["fc.weight"] == (1008, 2048)
    trained = [name for name in shapes if not name.endswith("num_batches_tracked")]
    assert len(trained) == 94 * 5 + 2


@torch.no_grad()
def test_whole_network(network):
    image = torch.rand(1, 3, 299, 299) * 2 - 1
    grid, _ = network.grid(image)
    features, logits, _ = network(image)
    assert grid.shape == (1, 2048, 8, 8)
    torch.testing.assert_close(features, grid.mean((2, 3)))
    torch.testing.assert_close(logits, features @ network.fc.weight.T + network.fc.bias)
    assert features.std() > 0


@torch.no_grad()
def test_spatial_features_are_the_first_channels_of_one_branch(network):
    """The stem and the blocks before it, one after the other: `mixed_6/conv` of the evaluator's graph is Mixed_6d's 1x1."""
    image = torch.rand(1, 3, 299, 299) * 2 - 1
    x = chain(network, image, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
    x = chain(network, F.max_pool2d(x, 3, stride=2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, stride=2)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
        x = getattr(network, f"Mixed_{name}")(x)
    branch = by_hand(network.Mixed_6d.branch1x1, x)
    spatial = network(image)[2].view(17, 17, 7)  # rows, columns, channels, as the graph lays them out
    torch.testing.assert_close(spatial, branch[0, :7].permute(1, 2, 0), rtol=1e-4, atol=1e-5)
