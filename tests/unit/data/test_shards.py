import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from tokar.data import shards
from tokar.data.images import decode
from tokar.data.index import ShardIndex, build_index, index_path
from tokar.data.prepare import prepare
from tokar.data.shards import ImageDataset
from tokar.data.transforms import Augment
from tokar.errors import UserError


@pytest.fixture
def prepared(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out", shard_size=6)
    return tmp_path / "out"


def _fetch(dataset, indices=None, seed=0):
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    return dataset.fetch(indices, np.zeros_like(indices), seed)


def test_every_image_has_its_bytes_key_and_label(class_folder, prepared):
    dataset = ImageDataset(prepared)
    assert (len(dataset), dataset.classes) == (20, ["cat", "dog", "owl"])
    for i in range(20):
        folder, stem = dataset.key(i).split("/")
        assert dataset.classes[dataset.labels[i]] == folder
        assert dataset.read(i) == (class_folder / folder / f"{stem}.jpg").read_bytes()


def test_batches_are_the_single_images_in_the_order_asked_for(prepared, monkeypatch):
    dataset = ImageDataset(prepared)
    order = np.random.default_rng(0).integers(0, 20, 50)
    singles = [dataset.read(int(i)) for i in order]
    assert dataset.read_many(order) == singles
    batch = _fetch(dataset, order)
    np.testing.assert_array_equal(batch["image"], np.stack([decode(data) for data in singles]))
    np.testing.assert_array_equal(batch["label"], dataset.labels[order])
    assert batch["label"].dtype == np.int64


def test_few_files_stay_open(prepared, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    dataset = ImageDataset(prepared)
    dataset._files.limit = 2
    order = np.random.default_rng(0).integers(0, 20, 50)
    assert dataset.read_many(order) == [ImageDataset(prepared).read(int(i)) for i in order]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_data_set_survives_fork_and_pickling(prepared):
    dataset = ImageDataset(prepared, transform=Augment(16, "random", flip=True))
    expected = _fetch(dataset)["image"]
    np.testing.assert_array_equal(_fetch(pickle.loads(pickle.dumps(dataset)))["image"], expected)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(_fetch(dataset)["image"], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(_fetch(dataset)["image"], expected)


def _third_party(folder, make, labels=("0", "1", "1", "0")):
    folder.mkdir()
    for shard in range(2):
        files = []
        for i in range(2):
            n = 2 * shard + i
            files.append((f"s{n}.jpg", make.save(make.picture(n))))
            files += [(f"s{n}.cls", labels[n].encode())] if labels[n] else []
        make.tar(folder / f"part{shard}.tar", files)
    return folder


def test_third_party_tars_are_indexed_on_first_use(tmp_path, make):
    folder = _third_party(tmp_path / "theirs", make)
    dataset = ImageDataset(folder)
    assert dataset.labels.tolist() == [0, 1, 1, 0]
    assert dataset.classes == ["0", "1"]
    assert index_path(folder / "part0.tar").exists()
    again = ImageDataset(str(folder / "part{0..1}.tar"))
    np.testing.assert_array_equal(_fetch(again)["image"], _fetch(dataset)["image"])
    piped = ImageDataset(f"pipe:cat {folder}/part{{0..1}}.tar")
    np.testing.assert_array_equal(_fetch(piped)["image"], _fetch(dataset)["image"])


def test_an_index_goes_to_the_cache_when_the_folder_cannot_be_written(tmp_path, make, monkeypatch):
    folder = _third_party(tmp_path / "theirs", make)
    original = ShardIndex.save

    def refuse(self, path):
        if path.parent == folder:
            raise UserError("Read-only file system", where=path)
        original(self, path)

    monkeypatch.setattr(ShardIndex, "save", refuse)
    expected = ImageDataset(folder).labels.tolist()
    assert not index_path(folder / "part0.tar").exists()
    monkeypatch.setattr("tokar.data.index.build_index", lambda *_: pytest.fail("the cached index was not used"))
    assert ImageDataset(folder).labels.tolist() == expected


def test_tars_without_any_label_are_unlabelled_and_some_without_are_refused(tmp_path, make):
    unlabelled = ImageDataset(_third_party(tmp_path / "none", make, ("", "", "", "")))
    assert (unlabelled.labels.tolist(), unlabelled.classes) == ([-1] * 4, [])
    with pytest.raises(UserError, match="1 samples have no label, the first is 's2'"):
        ImageDataset(_third_party(tmp_path / "some", make, ("0", "1", "", "0")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.cls", b"0")], "'a' has no image"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "'a' has the unknown label 'cat'"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"y")], "'a' occurs twice"),
    ],
)
def test_tars_that_cannot_be_indexed(tmp_path, make, files, message):
    make.tar(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=message):
        ImageDataset(tmp_path)


def test_an_older_index_of_a_plain_folder_is_rebuilt_with_a_warning(tmp_path, make, caplog):
    folder = _third_party(tmp_path / "theirs", make)
    ImageDataset(folder)
    time.sleep(0.01)
    make.tar(folder / "part0.tar", [("new.jpg", make.save(make.picture(9))), ("new.cls", b"5")])
    dataset = ImageDataset(folder)
    assert [dataset.key(i) for i in range(len(dataset))] == ["new", "s2", "s3"]
    assert [record.message for record in caplog.records] == [f"{folder}/part0.tar: the index is older than its tar; rebuilt"]
    caplog.clear()
    assert len(ImageDataset(folder)) == 3
    assert not caplog.records


def test_an_older_index_of_a_prepared_shard_is_refused_unless_nothing_changed(prepared, caplog):
    tar = prepared / "train/shard-000000.tar"
    later = time.time() + 5
    os.utime(tar, (later, later))
    assert len(ImageDataset(prepared)) == 20  # a copied folder: new times, same content
    assert not caplog.records
    data = bytearray(tar.read_bytes())
    index = build_index(tar, [])
    position = int(index.offset[0]) - 1024  # the .cls member precedes its image
    assert data[position : position + 1].isdigit()
    data[position] = ord("0") + (data[position] - ord("0") + 1) % 3
    tar.write_bytes(data)
    os.utime(tar, (later + 100, later + 100))
    with pytest.raises(UserError, match="changed after its index was made; run tokar data verify"):
        ImageDataset(prepared)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda out: (out / "train/shard-000001.tar").unlink(), "the shard is missing"),
        (lambda out: (out / "train/manifest.json").unlink(), "the preparation was interrupted"),
        (lambda out: (out / "train/manifest.json").write_text("[]"), "not a JSON object"),
        (lambda out: (out / "train/manifest.json").write_text("{}"), "not a manifest of format 1"),
        (lambda out: shutil.rmtree(out / "train"), "no shards for split 'train'"),
        (lambda out: shutil.rmtree(out), "no such folder"),
        (lambda out: shutil.copy(out / "train/shard-000003.tar", out / "train/shard-000000.tar"), "changed after its index"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(prepared, harm, message):
    harm(prepared)
    with pytest.raises(UserError, match=message) as caught:
        ImageDataset(prepared)
    assert "\n" not in str(caught.value)


def test_a_wrong_split_names_the_right_ones(prepared):
    with pytest.raises(UserError, match="it has: train"):
        ImageDataset(prepared, "val")


def test_a_truncated_tar_is_refused(tmp_path, make):
    make.tar(tmp_path / "x.tar", [("a.jpg", make.save(make.picture())), ("a.cls", b"0")], truncate=700)
    with pytest.raises(UserError, match="truncated inside a member"):
        ImageDataset(tmp_path)


def test_a_shard_that_shrinks_while_in_use_is_refused(prepared):
    dataset = ImageDataset(prepared)
    os.truncate(prepared / "train/shard-000000.tar", 2000)
    with pytest.raises(UserError, match=r"shard-000000\.tar: the shard is shorter than its index says"):
        _fetch(dataset)


def test_an_undecodable_image_is_named(tmp_path, make):
    make.tar(tmp_path / "x.tar", [("good.jpg", make.save(make.picture())), ("bad.jpg", b"\xff\xd8\xff nothing")])
    with pytest.raises(UserError, match=r"x\.tar: bad: .*on_bad=skip"):
        _fetch(ImageDataset(tmp_path))


def test_images_of_several_sizes_need_a_crop(tmp_path, make):
    files = [(f"{side}.png", make.save(make.picture(side, side, side), "PNG")) for side in (16, 20, 12)]
    make.tar(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match="the image is 20×20, others are 16×16; choose a crop"):
        _fetch(ImageDataset(tmp_path))
    assert _fetch(ImageDataset(tmp_path, transform=Augment(16)))["image"].shape == (3, 16, 16, 3)
    with pytest.raises(UserError, match="not 16×16; choose crop=center"):
        _fetch(ImageDataset(tmp_path, transform=Augment(16, "none")))


def test_the_data_modules_do_not_import_torch():
    modules = [f"tokar.data.{name}" for name in ("sources", "prepare", "shards", "transforms", "codes", "bench", "check")]
    heavy = {"torch", "webdataset", "sklearn", "rich"}
    code = f"import sys, importlib\nfor n in {modules}: importlib.import_module(n)\nprint(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
