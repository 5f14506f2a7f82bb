import shutil
import zipfile

import numpy as np
import pytest
from tokar.data.images import BadImageError, decode
from tokar.data.sources import available_splits, open_source
from tokar.data.tars import scan
from tokar.errors import UserError


def _all(source):
    return [source.item(i) for i in range(len(source))]


def test_digits_are_split_by_class_and_never_overlap():
    datasets = pytest.importorskip("sklearn.datasets").load_digits()
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert len(train) + len(val) == 1797
    assert len(val) == sum(np.sum(datasets.target == digit) // 6 for digit in range(10))
    assert not {item.key for item in _all(train)} & {item.key for item in _all(val)}
    counts = np.bincount([item.label for item in _all(val)])
    assert counts.min() >= 29
    item = val.item(10)
    number = int(item.key.removeprefix("digit-"))
    assert item.label == datasets.target[number]
    np.testing.assert_array_equal(decode(item.read())[:, :, 0], np.rint(datasets.images[number] / 16 * 255))
    with pytest.raises(UserError, match="it has: train, val"):
        open_source("digits", "test")


def test_class_folders_give_sorted_classes_and_their_labels(class_folder):
    source = open_source(str(class_folder), "train")
    assert source.classes == ["cat", "dog", "owl"]
    items = _all(source)
    assert [item.label for item in items] == [0] * 7 + [1] * 5 + [2] * 8
    assert items[7].key == "dog/000"
    assert items[7].read() == (class_folder / "dog" / "000.jpg").read_bytes()
    assert available_splits(str(class_folder)) == ["train"]


def test_split_folders_share_one_class_list(class_folder, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    shutil.copytree(class_folder, root / "train")
    shutil.copytree(class_folder / "owl", root / "val" / "owl")
    assert available_splits(str(root)) == ["train", "val"]
    val = open_source(str(root), "val")
    assert val.classes == ["cat", "dog", "owl"]
    assert {item.label for item in _all(val)} == {2}
    with pytest.raises(UserError, match=r"no split 'test'.*it has: train, val"):
        open_source(str(root), "test")


def _zip(path, folder, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return str(path)


@pytest.mark.parametrize("prefix", ["", "train/", "wrapper/train/"])
def test_a_zip_is_the_same_as_its_folder(class_folder, tmp_path, prefix):
    spec = _zip(tmp_path / "x.zip", class_folder, prefix)
    folder, zipped = open_source(str(class_folder), "train"), open_source(spec, "train")
    assert available_splits(spec) == ["train"]
    assert zipped.classes == folder.classes
    facts = [[(item.key, item.label, item.read()) for item in _all(source)] for source in (folder, zipped)]
    assert facts[0] == facts[1]


def test_a_wrapper_that_could_be_a_class_is_refused(class_folder, tmp_path):
    with pytest.raises(UserError, match="one class, or a wrapper"):
        open_source(_zip(tmp_path / "x.zip", class_folder, "wrapper/"), "train")


def test_a_class_called_train_is_a_class(class_folder):
    (class_folder / "owl").rename(class_folder / "train")
    assert open_source(str(class_folder), "train").classes == ["cat", "dog", "train"]


def test_a_damaged_zip_member_is_a_bad_item(class_folder, tmp_path):
    spec = _zip(tmp_path / "x.zip", class_folder)
    with zipfile.ZipFile(spec) as archive:
        offset = archive.getinfo("cat/000.jpg").header_offset
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[offset + 200] ^= 255
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(BadImageError, match="zip member cannot be read"):
        open_source(spec, "train").item(0).read()


def test_images_outside_the_class_folders_lack_a_label(class_folder):
    shutil.copy(class_folder / "cat" / "000.jpg", class_folder / "stray.jpg")
    (class_folder / "README.md").write_text("not an item")
    problems = [(item.key, item.problem) for item in _all(open_source(str(class_folder), "train")) if item.problem]
    assert problems == [("stray", "no label: the image lies outside the class folders")]


def test_keys_have_no_dots_in_their_last_part(class_folder):
    (class_folder / "cat" / "000.jpg").rename(class_folder / "cat" / "a.b.jpg")
    assert "cat/a_b" in {item.key for item in _all(open_source(str(class_folder), "train"))}


def _wds(tmp_path, make, name="x-000.tar", start=0, labels=("0", "1")):
    files = []
    for i, label in enumerate(labels):
        files += [(f"k{start + i}.jpg", make.save(make.picture(start + i))), (f"k{start + i}.cls", label.encode())]
    return make.tar(tmp_path / name, files)


def test_tars_by_pattern_folder_and_pipe_are_the_same(tmp_path, make, monkeypatch):
    folder = tmp_path / "tars"
    folder.mkdir()
    _wds(folder, make), _wds(folder, make, "x-001.tar", 2, ("1", "2"))
    for spec in (
        f"{folder}/x-{{000..001}}.tar",
        str(folder),
        f"pipe:cat {folder}/x-{{000..001}}.tar",
        f"file://{folder}/x-{{000,001}}.tar",
    ):
        source = open_source(spec, "train")
        assert [(item.key, item.label) for item in _all(source)] == [("k0", 0), ("k1", 1), ("k2", 1), ("k3", 2)]
        assert source.classes == ["0", "1", "2"]
        assert source.item(3).read() == make.save(make.picture(3))


def test_remote_shards_are_fetched_once(tmp_path, make):
    tar = _wds(tmp_path, make)
    log = tmp_path / "log"
    spec = f"pipe:echo x >> {log}; cat {tar}"
    assert len(open_source(spec, "train")) == len(open_source(spec, "train")) == 2
    assert log.read_text() == "x\n"


def test_gzipped_tars_are_unpacked_into_the_cache(tmp_path, make):
    import gzip

    tar = _wds(tmp_path, make)
    zipped = tmp_path / "y.tar.gz"
    zipped.write_bytes(gzip.compress(tar.read_bytes()))
    assert [item.key for item in _all(open_source(str(zipped), "train"))] == ["k0", "k1"]
    zipped = tmp_path / "z.tar.gz"
    zipped.write_bytes(gzip.compress(tar.read_bytes())[:-20])
    with pytest.raises(UserError, match="ends too early"):
        open_source(str(zipped), "train")


@pytest.mark.parametrize("command", ["exit 3", "true", "nosuchcommand 2>/dev/null"])
def test_a_failing_pipe_leaves_nothing_in_the_cache(tmp_path, command):
    with pytest.raises(UserError, match=r"cannot be read|ends too early"):
        open_source(f"pipe:{command}", "train")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="cannot be read"):
        open_source("gopher://example/x.tar", "train")


def test_labels_of_tars_missing_unknown_or_without_image(tmp_path, make):
    image = make.save(make.picture())
    files = [("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image), ("c.jpg", image), ("c.cls", b"cat"), ("d.cls", b"1")]
    spec = str(make.tar(tmp_path / "x.tar", files))
    problems = [item.problem for item in _all(open_source(spec, "train"))]
    assert [problem[:8] for problem in problems] == ["", "no label", "unknown ", "no image"]


def test_a_truncated_tar_keeps_its_whole_samples_and_says_so(tmp_path, make):
    tar = _wds(tmp_path, make, labels=("0", "1", "1"))
    third = next(member for member in scan(tar) if member.name == "k2.jpg")
    tar.write_bytes(tar.read_bytes()[: third.offset + 100])
    items = _all(open_source(str(tar), "train"))
    assert [item.problem for item in items] == ["", "", "the tar is truncated inside a member"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such source"),
        ("digit", None, "did you mean 'digits'"),
        ("x.zip", b"not a zip", "not a readable zip"),
        ("x.txt", b"words", "not a zip or tar"),
        ("x.tar", None, "no such tar"),
        ("x-{000.tar", None, "unbalanced braces|no such"),
    ],
)
def test_specs_that_name_nothing(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(name, "train")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        open_source(str(tmp_path), "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "line"), [("photos", "no such source"), ("notes.txt", "not a zip or tar"), ("x.zip", "not a readable zip")]
)
def test_splits_of_what_is_no_source(tmp_path, name, line):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.zip").write_text("PK")
    with pytest.raises(UserError, match=line):
        available_splits(str(tmp_path / name))
