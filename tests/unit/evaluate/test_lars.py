import torch
from tokar.evaluate.lars import LARS
from torch import nn


def test_a_step_is_a_share_of_the_weight_and_has_momentum():
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([matrix, vector], lr=0.5, momentum=0.9, trust=0.01)
    for gradient in (2.0, 1.0):
        matrix.grad, vector.grad = torch.tensor([[0.0, gradient]]), torch.tensor([gradient])
        optimizer.step()
    first = torch.tensor([[3.0, 4.0 - 0.5 * 0.01 * 5]])
    second = first - torch.tensor([[0.0, 0.5 * 0.01 * (0.9 * 5 + first.norm())]])
    torch.testing.assert_close(matrix.data, second)
    torch.testing.assert_close(vector.data, torch.tensor([1 - 0.5 * 2 - 0.5 * (0.9 * 2 + 1)]))


def test_a_weight_or_a_gradient_of_zero_takes_the_gradient_as_it_is():
    weight = nn.Parameter(torch.zeros(1, 2))
    weight.grad = torch.tensor([[1.0, 2.0]])
    still = nn.Parameter(torch.ones(1, 2))
    still.grad = torch.zeros(1, 2)
    LARS([weight, still, nn.Parameter(torch.ones(1))], lr=0.1).step()
    torch.testing.assert_close(weight.data, torch.tensor([[-0.1, -0.2]]))
    torch.testing.assert_close(still.data, torch.ones(1, 2))
