import json

import pytest
import torch
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.convert.families import names, recognise
from tokar.models.convert.parity import compare, run_parity


def test_floats_are_relative_to_the_largest_value():
    answer = torch.tensor([100.0, 0.0])
    assert compare("x", answer + 0.005, answer).difference == pytest.approx(5e-5, rel=1e-3)
    assert compare("x", answer + 0.005, answer).ok
    assert not compare("x", answer + 0.02, answer).ok


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integers_must_be_equal(dtype):
    answer = torch.tensor([1, 0, 1, 1]).to(dtype)
    assert compare("x", answer.clone(), answer).ok
    other = torch.tensor([1, 1, 1, 1]).to(dtype)
    assert compare("x", other, answer).difference == 0.25
    assert not compare("x", other, answer).ok


@pytest.mark.parametrize("ours", [None, torch.zeros(3), torch.tensor([1.0, float("nan")])])
def test_what_cannot_be_compared_fails(ours):
    assert not compare("x", ours, torch.ones(2)).ok


def test_half_precision_answers_and_zero_answers_compare():
    assert compare("x", torch.zeros(2), torch.zeros(2)).ok
    assert not compare("x", torch.ones(2), torch.zeros(2)).ok


def test_unknown_weights_name_the_families():
    with pytest.raises(UserError, match=r"weights of no known family \(a\.b, …\); known families: .*llamagen_vq"):
        recognise({"a.b": torch.ones(1)})
    assert "llamagen_vq" in names()


def test_a_file_that_is_no_parity_file_is_refused(tmp_path):
    save_file({"in.image": torch.ones(1)}, tmp_path / "a.safetensors", {"config": json.dumps({})})
    with pytest.raises(UserError, match=r"no answers in it"):
        run_parity(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("no")
    for name in ("b.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="not a parity file"):
            run_parity(tmp_path / name)
