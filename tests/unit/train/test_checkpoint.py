import json
import resource

import pytest
import torch
from tokar.errors import UserError
from tokar.train import checkpoint, store
from tokar.train.checkpoint import Checkpoints

STATE = {"samples": 0, "seed": 0, "world": 1, "main": "net"}


def quiet(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def save(workers, tmp_path):
    return Checkpoints(tmp_path, workers, keep=9, background=False).save


@pytest.fixture
def saved(make_network, train, save, tmp_path):
    """A run of 6 steps saved after 2 and 4: its folder, and its network at the end."""
    network = make_network()
    train(network, 2)
    save({"net": network}, {}, {**STATE, "step": 2})
    train(network, 2, 2)
    save({"net": network}, {"loss": torch.tensor([3.0, 2.0])}, {**STATE, "step": 4})
    train(network, 2, 4)
    return tmp_path, network


def test_restored_training_goes_on_bitwise(saved, make_network, train, workers):
    folder, straight = saved
    network = make_network(seed=99)
    found = store.newest(folder, quiet)
    meters = checkpoint.restore(found, {"net": network}, workers)
    assert found.step == 4
    assert torch.equal(meters["loss"], torch.tensor([3.0, 2.0]))
    train(network, 2, 4)
    for (name, a), b in zip(straight.module.state_dict().items(), network.module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(straight.ema.shadow, network.ema.shadow, strict=True))
    for a, b in zip(straight.module.parameters(), network.module.parameters(), strict=True):
        mine, theirs = straight.optimizer.state[a], network.optimizer.state[b]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_nothing_is_pickled(saved):
    files = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors", ""}  # "" is the marker


def test_a_checkpoint_without_its_marker_does_not_count(saved):
    folder, _ = saved
    (folder / "step-00000004" / "COMPLETE").unlink()
    assert store.newest(folder, quiet).step == 2
    store.sweep_unfinished(folder)
    assert not (folder / "step-00000004").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_falls_back_with_a_word(saved, damage):
    folder, _ = saved
    file = folder / "step-00000004" / "net" / "optim.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-1])
    said = []
    assert store.newest(folder, said.append).step == 2
    assert len(said) == 1
    assert "optim.safetensors" in said[0]


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(saved):
    folder, _ = saved
    for path in folder.glob("step-*/state.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        store.newest(folder, lambda line: None)


@pytest.fixture
def largest_file():
    """Files beyond a size cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 100, 500])
def test_a_full_disk_leaves_no_half_checkpoint(make_network, save, tmp_path, largest_file, size):
    network = make_network()
    largest_file(size)
    with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
        save({"net": network}, {}, {**STATE, "step": 1})
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_networks_is_refused(saved, make_network, workers):
    newest = store.newest(saved[0], quiet)
    with pytest.raises(UserError, match="the checkpoint has a network 'net', this run has none"):
        checkpoint.restore(newest, {}, workers)
    with pytest.raises(UserError, match="the checkpoint has no network 'other'"):
        checkpoint.restore(newest, {"net": make_network(), "other": make_network()}, workers)


def test_pruning_keeps_the_newest_and_the_wanted(make_network, save, tmp_path):
    network = make_network()
    for step in range(1, 7):
        save({"net": network}, {}, {**STATE, "step": step})
    store.prune(tmp_path, keep=2, keep_step=lambda step: step % 3 == 0)
    assert [path.name for path in store.listed(tmp_path)] == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_newer_format_is_refused(saved):
    path = saved[0] / "step-00000004"
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99 is newer"):
        store.read_state(path)


def test_another_family_is_told_by_its_name(saved, workers):
    from tokar.conf.spine import Optim
    from tokar.train.network import Trainable
    from torch import nn

    other = workers.wrap({"net": Trainable(nn.Linear(4, 8), {"_target_": "x"}, Optim(lr=1.0))}, None)
    with pytest.raises(UserError, match="net: holds weights of Identity, this run trains Linear; take one of the same family"):
        checkpoint.restore(store.newest(saved[0], quiet), other, workers)
