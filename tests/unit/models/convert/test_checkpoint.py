import argparse

import pytest
import torch
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.convert.checkpoint import read_checkpoint, unwrap

WEIGHT = torch.ones(2)


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        ({"w": WEIGHT}, ""),
        ({"model": {"w": WEIGHT}, "steps": 3, "optimizer": {}}, "model"),
        ({"module": {"w": WEIGHT}}, "module"),
        ({"state_dict": {"w": WEIGHT}}, "state_dict"),
        ({"model": {"w": WEIGHT * 2}, "ema": {"w": WEIGHT}}, "ema"),
        ({"state_dict": {"model": {"w": WEIGHT}}}, "state_dict.model"),
        ({"model": {"module._orig_mod.w": WEIGHT}}, "model"),
        ({"_orig_mod.module.w": WEIGHT}, ""),
    ],
)
def test_wrappers_come_off(content, wrapper):
    state, found = unwrap(content)
    assert found == wrapper
    assert set(state) == {"w"}
    assert torch.equal(state["w"], WEIGHT)


def test_compiled_submodules_lose_their_mark():
    assert set(unwrap({"encoder._orig_mod.w": WEIGHT})[0]) == {"encoder.w"}


@pytest.mark.parametrize(
    ("content", "message"), [({"steps": 3}, "holds no weights"), ({"w": WEIGHT, "module.w": WEIGHT}, "two names are equal")]
)
def test_what_is_no_state_dict_is_refused(content, message):
    with pytest.raises(UserError, match=message):
        unwrap(content)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_a_command_line_inside_are_read(tmp_path, zipped):
    content = {"model": {"w": WEIGHT}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["model"]["w"], WEIGHT)


def test_safetensors_are_read(tmp_path):
    save_file({"w": WEIGHT}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["w"], WEIGHT)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_files_that_could_run_code_are_refused(tmp_path):
    torch.save({"model": Trap()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds exec, an object that could run code when read; save its state dict alone"):
        read_checkpoint(tmp_path / "a.pt")


def test_broken_and_missing_files_are_refused(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"w": torch.randn(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello\n")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    torch.save([1], tmp_path / "list.pt")
    for name in ("cut.pt", "empty.pt", "text.pt", "cut.safetensors", "list.pt", "no.pt"):
        with pytest.raises(UserError) as refusal:
            read_checkpoint(tmp_path / name)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
