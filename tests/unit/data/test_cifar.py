"""Real JPEGs: CIFAR-10 and ImageNet samples, where the optional folder of data is there."""

import itertools
import zipfile

import numpy as np
import pytest
import torch
from tokar.data.bench import loader_speed
from tokar.data.images import decode
from tokar.data.prepare import prepare, verify
from tokar.data.shards import ImageDataset
from tokar.data.sources import open_source
from tokar.data.stream import Stream
from tokar.data.transforms import Augment, TenCrop


@pytest.fixture(scope="module")
def cifar(shared_data, tmp_path_factory):
    """600 CIFAR-10 test images as a zip, and prepared."""
    folder = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(shared_data / "cifar10-test.zip") as whole, zipfile.ZipFile(folder / "small.zip", "w") as small:
        names = [name for name in whole.namelist() if name.endswith(".jpg")]
        for name in names[:: len(names) // 600][:600]:
            small.writestr(name, whole.read(name))
    prepare(str(folder / "small.zip"), folder / "out", shard_size=128, workers=2)
    return folder


def test_the_whole_archive_is_understood(shared_data):
    source = open_source(str(shared_data / "cifar10-test.zip"), "test")
    assert (len(source), len(source.classes), source.classes[0]) == (10_000, 10, "airplane")
    assert np.bincount([source.item(i).label for i in range(10_000)]).tolist() == [1000] * 10


def test_prepared_images_are_the_original_files(cifar):
    dataset = ImageDataset(cifar / "out", "test")
    with zipfile.ZipFile(cifar / "small.zip") as archive:
        for i in range(0, 600, 7):
            assert dataset.read(i) == archive.read(f"test/{dataset.key(i)}.jpg")
    assert verify(cifar / "out", decode_all=True) == []


def test_decoders_agree_on_real_jpegs(cifar):
    pytest.importorskip("simplejpeg")
    for data in ImageDataset(cifar / "out", "test").read_many(range(600)):
        np.testing.assert_array_equal(decode(data, "simplejpeg"), decode(data, "pil"))


def test_the_stream_of_real_images_is_exact(cifar):
    dataset = ImageDataset(cifar / "out", "test", transform=Augment(32, flip=True))
    steps = {}
    for workers in (0, 2):
        iterator = Stream(dataset, batch_size=100, seed=0, workers=workers).batches(550)
        steps[workers] = [micro for (micro,) in itertools.islice(iterator, 8)]
        iterator.close()
    for one, other in zip(steps[0], steps[2], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loader_benchmark_reports_both(cifar):
    result = loader_speed(cifar / "out", seconds=0.3, batch_size=64, split="test")
    assert result["images_per_s"] > 0
    assert result["webdataset_images_per_s"] > 0
    assert result["ratio"] == pytest.approx(result["images_per_s"] / result["webdataset_images_per_s"], rel=0.01)
    assert result["image_size"] == [32, 32]


def test_imagenet_samples_become_ten_crops(shared_data, tmp_path):
    source = open_source(str(shared_data / "imagenet-samples-256.zip"), "val")
    assert (len(source), len(source.classes)) == (1000, 1000)
    assert [source.item(i).label for i in (0, 999)] == [0, 999]
    with zipfile.ZipFile(shared_data / "imagenet-samples-256.zip") as whole, zipfile.ZipFile(tmp_path / "x.zip", "w") as small:
        for name in whole.namelist()[:200:20]:
            small.writestr(name, whole.read(name))
    prepare(str(tmp_path / "x.zip"), tmp_path / "out", size=64)
    dataset = ImageDataset(tmp_path / "out", transform=TenCrop(32))
    batch = next(Stream(dataset, batch_size=4, seed=0).once())
    assert batch["image"].shape == (4, 10, 32, 32, 3)
