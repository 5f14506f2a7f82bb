from types import SimpleNamespace

import pytest
import torch
from tokar.errors import UserError
from tokar.train.clock import Clock
from tokar.train.loop import Fit


def loop(said, step=140, reach=1.0):
    return SimpleNamespace(
        meters=SimpleNamespace(reach={"train/codes/usage": reach}),
        clock=Clock(step, 320, 200, 8, 100),
        folder="runs/x",
        told=set(),
        progress=SimpleNamespace(say=said.append),
    )


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(loss):
    with pytest.raises(UserError, match=rf"runs/x: the loss is {loss} at step 140; lower optim\.lr"):
        Fit._check(loop([]), {"train/loss": loss})


def test_a_collapsed_codebook_is_told_once():
    said = []
    fit = loop(said)
    for _ in range(3):
        Fit._check(fit, {"train/loss": 1.0, "train/codes/usage": 0.004, "train/codes/perplexity": 1.0})
    assert len(said) == 1
    assert "train/codes/usage is 0.0040 at step 140: the codebook has collapsed" in said[0]


def test_a_codebook_in_use_is_not_told():
    said = []
    Fit._check(loop(said), {"train/loss": 1.0, "train/codes/usage": 0.5})
    assert said == []


def test_a_scale_of_few_tokens_is_measured_by_what_it_could_use():
    said = []
    Fit._check(loop(said, reach=0.1), {"train/loss": 1.0, "train/codes/usage": 0.004})
    assert said == []
    Fit._check(loop(said, reach=0.1), {"train/loss": 1.0, "train/codes/usage": 0.001})
    assert len(said) == 1


def test_a_codebook_may_settle_first():
    said = []
    Fit._check(loop(said, step=40), {"train/loss": 1.0, "train/codes/usage": 0.004})
    assert said == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(make_network, workers, value):
    network = make_network()
    fit = SimpleNamespace(**vars(loop([])), workers=workers, networks={"tokenizer": network})
    Fit._check_weights(fit)
    with torch.no_grad():
        network.module[0].weight[0, 0] = value
    with pytest.raises(UserError, match=r"runs/x: the tokenizer's weights are not finite at step 140; lower optim\.lr"):
        Fit._check_weights(fit)
