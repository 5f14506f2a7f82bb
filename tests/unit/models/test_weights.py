import pytest
import torch
from safetensors.torch import load_file
from tokar.errors import UserError
from tokar.models.weights import WeightFiles, part_name, save_weights, write_streamed


@pytest.fixture
def whole():
    torch.manual_seed(0)
    return {"a": torch.randn(4, 3), "b": torch.arange(5), "c": torch.randn(2, 2, dtype=torch.bfloat16), "d@e": torch.ones(())}


@pytest.fixture
def parts(whole, tmp_path):
    """The same tensors over three files, `a` in runs of 5, 5 and 2 elements."""
    flat = whole["a"].flatten()
    shapes = {"a": whole["a"].shape}
    save_weights({"a@0": flat[:5], "b": whole["b"]}, tmp_path / part_name("model", 0, 3), shapes)
    save_weights({"a@5": flat[5:10], "c": whole["c"]}, tmp_path / part_name("model", 1, 3), shapes)
    save_weights({"a@10": flat[10:], "d@e": whole["d@e"]}, tmp_path / part_name("model", 2, 3), shapes)
    return tmp_path


def test_parts_read_as_one_file_does(parts, whole):
    files = WeightFiles(parts, "model")
    assert {name: shape for name, (shape, _) in files.kinds.items()} == {name: value.shape for name, value in whole.items()}
    assert all(torch.equal(value, whole[name]) for name, value in files.all().items())


@pytest.mark.parametrize(("start", "count"), [(0, 12), (3, 4), (4, 7), (11, 1), (0, 0)])
def test_a_run_of_elements_may_cross_parts(parts, whole, start, count):
    if count:
        assert torch.equal(WeightFiles(parts, "model").read_run("a", start, count), whole["a"].flatten()[start : start + count])


def test_a_run_of_a_whole_tensor(tmp_path, whole):
    save_weights(whole, tmp_path / "ema.safetensors")
    assert torch.equal(WeightFiles(tmp_path, "ema").read_run("a", 4, 5), whole["a"].flatten()[4:9])


def test_a_missing_part_or_element_is_told(parts):
    (parts / part_name("model", 1, 3)).unlink()
    with pytest.raises(UserError, match="1 of 3 parts are missing"):
        WeightFiles(parts, "model")
    save_weights({"c": torch.zeros(2, 2)}, parts / part_name("model", 1, 3))
    with pytest.raises(UserError, match="elements of a are missing"):
        WeightFiles(parts, "model").read("a")


def test_a_broken_file_is_told(parts):
    (parts / part_name("model", 0, 3)).write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        WeightFiles(parts, "model").all()


def test_streamed_files_are_those_of_safetensors(parts, whole, tmp_path):
    files, asked = WeightFiles(parts, "model"), []

    def read(name):
        asked.append(name)
        return files.read(name)

    write_streamed(files.kinds, read, tmp_path / "one.safetensors")
    assert asked == list(files.kinds)
    loaded = load_file(tmp_path / "one.safetensors")
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())
