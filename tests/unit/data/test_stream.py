import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.data.prepare import prepare
from tokar.data.shards import ImageDataset
from tokar.data.stream import Stream, to_image, to_uint8
from tokar.data.transforms import Augment
from tokar.errors import UserError


class Numbers:
    """A data set whose sample i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def fetch(self, indices, epochs, seed):
        return {"codes": indices[:, None] * 10 + epochs[:, None], "label": indices % 3}


@pytest.fixture
def images(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out", shard_size=6)
    return ImageDataset(tmp_path / "out", transform=Augment(16, "random", flip=True))


def _steps(stream, position, count):
    iterator = stream.batches(position)
    steps = list(itertools.islice(iterator, count))
    iterator.close()
    return steps


def _joined(steps):
    """All micro-batches of all steps, one after the other."""
    return {name: torch.cat([micro[name] for step in steps for micro in step]) for name in steps[0][0]}


@given(n=st.integers(1, 40), batch=st.integers(1, 30), seed=st.integers(0, 2**32), start=st.integers(0, 100))
@settings(deadline=None)
def test_every_epoch_is_a_permutation_and_batches_straddle_epochs(n, batch, seed, start):
    stream = Stream(Numbers(n), batch_size=batch, seed=seed)
    joined = _joined(_steps(stream, start, -(-3 * n // batch)))
    positions = start + np.arange(len(joined["index"]))
    np.testing.assert_array_equal(joined["epoch"], positions // n)
    for epoch in set((positions // n).tolist()):
        seen = joined["index"][joined["epoch"] == epoch].tolist()
        assert len(set(seen)) == len(seen)
        expected = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        np.testing.assert_array_equal(seen, expected[positions[positions // n == epoch] % n])


@given(batch=st.integers(1, 40), world=st.integers(1, 5), accumulate=st.integers(1, 4), position=st.integers(0, 200))
@settings(deadline=None)
def test_ranks_and_micro_batches_partition_the_global_batch(batch, world, accumulate, position):
    if batch < world * accumulate:
        with pytest.raises(UserError, match="cannot be cut"):
            Stream(Numbers(17), batch_size=batch, seed=3, world=world, accumulate=accumulate)
        return
    streams = [Stream(Numbers(17), batch_size=batch, seed=3, rank=r, world=world, accumulate=accumulate) for r in range(world)]
    shares = [_steps(stream, position, 1) for stream in streams]
    assert all(len(steps[0]) == accumulate for steps in shares)
    sizes = [len(micro["index"]) for steps in shares for micro in steps[0]]
    assert sum(sizes) == batch
    assert min(sizes) >= 1
    expected = streams[0].samples(position)
    np.testing.assert_array_equal(torch.cat([_joined(steps)["index"] for steps in shares]), expected[0])
    np.testing.assert_array_equal(torch.cat([_joined(steps)["epoch"] for steps in shares]), expected[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores here
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_global_batches_for_any_workers_and_ranks(images, workers, world):
    """Pixels included, across two epoch ends (20 samples), with and without accumulation, from a position inside a batch."""
    for position, accumulate in ((0, 1), (33, 2)):
        expected = _joined(_steps(Stream(images, batch_size=7, seed=5), position, 5))
        options = {"batch_size": 7, "seed": 5, "world": world, "accumulate": accumulate, "workers": workers}
        shares = [_steps(Stream(images, rank=rank, **options), position, 5) for rank in range(world)]
        joined = _joined([list(itertools.chain(*(share[step] for share in shares))) for step in range(5)])
        assert joined.keys() == expected.keys() == {"image", "label", "index", "epoch"}
        for name in expected:
            assert torch.equal(joined[name], expected[name]), name
        assert joined["epoch"].max() > joined["epoch"].min()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_continues_the_same_stream(images, workers):
    whole = _steps(Stream(images, batch_size=6, seed=1, workers=workers), 0, 9)
    for step in (1, 4, 8):
        (resumed,) = _steps(Stream(images, batch_size=6, seed=1, workers=workers), 6 * step, 1)
        assert all(torch.equal(resumed[0][name], whole[step][0][name]) for name in resumed[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(images, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _steps(Stream(images, batch_size=6, seed=1, workers=workers), 0, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_types_and_shapes(images):
    ((micro,),) = _steps(Stream(images, batch_size=5, seed=0), 0, 1)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in micro.items()} == {
        "image": (torch.uint8, (5, 16, 16, 3)),
        "label": (torch.int64, (5,)),
        "index": (torch.int64, (5,)),
        "epoch": (torch.int64, (5,)),
    }
    np.testing.assert_array_equal(micro["label"], images.labels[micro["index"]])


def test_seeds_differ_and_shuffle_can_be_off():
    orders = [_joined(_steps(Stream(Numbers(30), batch_size=30, seed=seed), 0, 2))["index"].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0][:30] != orders[0][30:]
    plain = _joined(_steps(Stream(Numbers(4), batch_size=3, seed=0, shuffle=False), 2, 2))
    assert plain["index"].tolist() == [2, 3, 0, 1, 2, 3]
    assert plain["epoch"].tolist() == [0, 0, 1, 1, 1, 1]


def test_a_transform_can_be_given_with_the_stream(images):
    ((micro,),) = _steps(Stream(images, batch_size=5, seed=0, transform=Augment(8)), 0, 1)
    assert micro["image"].shape == (5, 8, 8, 3)
    assert images.transform.size == 16
    with pytest.raises(UserError, match="only images take a transform"):
        Stream(Numbers(5), batch_size=1, seed=0, transform=Augment(8))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_one_pass_covers_every_sample_once_and_in_order(workers, world):
    streams = [Stream(Numbers(11), batch_size=6, seed=0, rank=rank, world=world, workers=workers) for rank in range(world)]
    for limit, expected in ((None, 11), (8, 8), (99, 11)):
        seen = [batch["index"].tolist() for stream in streams for batch in stream.once(limit)]
        assert list(itertools.chain(*seen)) == list(range(expected))
        assert max(map(len, seen)) == 6 // world


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_the_users_error(images, tmp_path, workers):
    os.truncate(tmp_path / "out/train/shard-000002.tar", 100)
    with pytest.raises(UserError, match=r"shard-000002\.tar: the shard is shorter than its index says") as caught:
        _steps(Stream(images, batch_size=10, seed=0, workers=workers), 0, 4)
    assert "\n" not in str(caught.value)


class Broken(Numbers):
    def fetch(self, indices, epochs, seed):
        raise RuntimeError("a bug")


def test_other_errors_of_a_worker_keep_their_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in fetch.*a bug"):
        _steps(Stream(Broken(5), batch_size=2, seed=0, workers=1), 0, 1)
    assert not multiprocessing.active_children()


def test_workers_outlive_signals_for_the_trainer_and_end_with_the_iterator():
    iterator = Stream(Numbers(50), batch_size=2, seed=0, workers=2).batches(0)
    next(iterator)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
    for _ in range(20):
        next(iterator)
    assert all(worker.is_alive() for worker in workers)
    iterator.close()
    deadline = time.monotonic() + 10
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)


def test_a_program_that_forgets_its_iterator_still_ends():
    code = (
        "import numpy as np; from tokar.data.stream import Stream\n"
        "class D:\n"
        "    def __len__(self): return 9\n"
        "    def fetch(self, i, e, s): return {'label': i}\n"
        "it = Stream(D(), batch_size=2, seed=0, workers=2).batches(0); next(it); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 3, "world": 2, "accumulate": 2},
            "batch_size: a batch of 3 cannot be cut for 2 ranks × 2 micro-batches",
        ),
        ({"batch_size": 4, "rank": 2, "world": 2}, "makes no sense"),
        ({"batch_size": 4, "seed": -1}, "makes no sense"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(UserError, match=message):
        Stream(Numbers(5), **{"seed": 0, **options})
    with pytest.raises(UserError, match="the data set is empty"):
        Stream(Numbers(0), batch_size=1, seed=0)


def test_pixels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    image = to_image(pixels)
    assert (image.shape, image.dtype) == ((2, 3, 16, 16), torch.float32)
    assert (image.min(), image.max()) == (-1, 1)
    assert image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(image[0, 0].flatten(), torch.arange(256) / 127.5 - 1)
    assert torch.equal(to_uint8(image), pixels)


def test_rounding_is_half_up_and_clamped():
    values = torch.tensor([-9.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1 - 0.49 / 127.5, 1 - 0.51 / 127.5, 1.0, 9.0])
    expected = [0, 0, 0, 1, 128, 255, 254, 255, 255]
    assert to_uint8(values.reshape(1, 1, 1, 9).repeat(1, 3, 1, 1))[0, 0, :, 0].tolist() == expected
