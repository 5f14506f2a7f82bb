import pytest
import torch
from tokar.errors import UserError
from tokar.models.generators.next_token import NextToken
from tokar.train.float8 import check_float8, to_float8
from torch import nn


def network() -> NextToken:
    torch.manual_seed(0)
    model = NextToken(16, 5, grid=(3, 3), dim=32, layers=2, heads=2, multiple_of=16)
    nn.init.normal_(model.head.weight, std=0.2)  # it begins as zeros, behind which nothing shows
    return model


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9 or more .*; set strategy\.precision=bf16"):
        check_float8(torch.device("cpu"))


def test_linear_layers_that_fit_multiply_in_float8_and_learn():
    pytest.importorskip("torchao", reason="needs torchao: pip install 'tokar[fp8]'")
    plain, rounded = network(), network()
    to_float8(rounded, emulate=True)
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    assert all(type(part).__name__ == "Float8Linear" for part in rounded.modules() if isinstance(part, nn.Linear))
    codes, classes = torch.randint(16, (4, 9)), torch.tensor([0, 1, 2, 3])
    losses = []
    for model in (plain, rounded):
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(codes, classes)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    for one, other in zip(plain.parameters(), rounded.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.9


def test_layers_that_do_not_fit_stay():
    pytest.importorskip("torchao", reason="needs torchao: pip install 'tokar[fp8]'")
    module = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 32))
    to_float8(module, emulate=True)
    assert [type(part).__name__ for part in module] == ["Linear", "Float8Linear"]
