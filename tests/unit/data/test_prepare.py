import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tokar.data import files, write_shard
from tokar.data.images import decode
from tokar.data.index import index_path
from tokar.data.prepare import inspect, prepare, verify
from tokar.data.shards import ImageDataset
from tokar.data.tars import scan
from tokar.errors import UserError


def _digests(folder):
    """Every file of a folder but those that are not content: the settings hold the place of the source."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))
    }


def _bad(out):
    return [json.loads(line) for line in (out / "train" / "bad.jsonl").read_text().splitlines()]


def test_shards_are_webdataset_shards(class_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    summary = prepare(str(class_folder), tmp_path / "out", shard_size=6)["train"]
    assert (summary["count"], summary["shards"], summary["skipped"], summary["classes"]) == (20, 4, 0, 3)
    names = ["cat", "dog", "owl"]
    seen = {}
    for sample in webdataset.WebDataset(str(tmp_path / "out/train/shard-{000000..000003}.tar"), shardshuffle=False):
        folder, stem = sample["__key__"].split("/")
        assert folder == names[int(sample["cls"])]
        assert sample["jpg"] == (class_folder / folder / f"{stem}.jpg").read_bytes()
        seen[sample["__key__"]] = True
    assert len(seen) == 20


def test_the_manifest_states_counts_checksums_and_settings(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out", shard_size=6, size=16)
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog", "owl"]
    assert manifest["per_class"] == [7, 5, 8]
    assert (manifest["count"], manifest["skipped"], manifest["image_size"]) == (20, 0, [16, 16])
    assert manifest["settings"]["size"] == 16
    for entry in manifest["shards"]:
        data = (tmp_path / "out/train" / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_any_number_of_workers_writes_the_same_bytes(class_folder, tmp_path):
    for workers in (0, 1, 3):
        prepare(str(class_folder), tmp_path / f"out{workers}", shard_size=3, workers=workers, size=16)
    expected = _digests(tmp_path / "out0")
    assert len(expected) == 7 * 2 + 3
    assert _digests(tmp_path / "out1") == expected
    assert _digests(tmp_path / "out3") == expected


@pytest.mark.parametrize(("format", "kind"), [("keep", "JPEG"), ("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_resized_images_have_the_size_and_the_format(class_folder, tmp_path, format, kind):
    prepare(str(class_folder), tmp_path / "out", size=16, format=format)
    dataset = ImageDataset(tmp_path / "out")
    picture = Image.open(io.BytesIO(dataset.read(0)))
    assert (picture.size, picture.format, picture.mode) == ((16, 16), kind, "RGB")


def test_without_the_crop_the_longer_side_stays(tmp_path, make):
    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/a.png").write_bytes(make.save(make.picture(1, 40, 20), "PNG"))
    prepare(str(tmp_path / "in"), tmp_path / "out", size=10, crop=False)
    assert decode(ImageDataset(tmp_path / "out").read(0)).shape == (20, 10, 3)


@pytest.fixture
def odd_folder(tmp_path, make):
    """Every odd input that must become RGB, and every bad one that must be listed."""
    root = tmp_path / "odd" / "cat"
    root.mkdir(parents=True)
    picture = make.picture(1, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "grey.jpg": make.save(Image.fromarray(picture).convert("L")),
        "rgba.png": make.save(Image.fromarray(picture).convert("RGBA"), "PNG"),
        "cmyk.jpg": make.save(Image.fromarray(picture).convert("CMYK")),
        "deep.png": make.save(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
        "turned.jpg": make.save(picture, exif=exif),
        "plain.jpg": make.save(picture),
        "plain_png.png": make.save(picture, "PNG"),
    }
    bad = {
        "zero.jpg": b"",
        "text.jpg": b"hello",
        "cut.jpg": make.save(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:3000],
        "plain.png": make.save(picture, "PNG"),
    }
    for name, data in {**good, **bad}.items():
        (root / name).write_bytes(data)
    (root.parent / "stray.jpg").write_bytes(good["plain.jpg"])
    return root.parent


def test_odd_images_become_rgb_and_ordinary_ones_keep_their_bytes(odd_folder, tmp_path):
    summary = prepare(str(odd_folder), tmp_path / "out")["train"]
    assert (summary["count"], summary["skipped"]) == (7, 5)
    dataset = ImageDataset(tmp_path / "out", transform=_Any())
    stored = {dataset.key(i): dataset.read(i) for i in range(len(dataset))}
    for key, data in stored.items():
        picture = Image.open(io.BytesIO(data))
        assert picture.mode == "RGB"
        assert picture.size == ((20, 30) if key == "cat/turned" else (30, 20))
    for name in ("plain.jpg", "plain_png.png"):
        assert stored[f"cat/{name.split('.')[0]}"] == (odd_folder / "cat" / name).read_bytes()
    np.testing.assert_array_equal(decode(stored["cat/rgba"]), decode((odd_folder / "cat" / "rgba.png").read_bytes()))


class _Any:
    shape, draws, direct = (1, 1, 3), 0, False


def test_bad_items_are_listed_with_their_reason_and_counted(odd_folder, tmp_path):
    prepare(str(odd_folder), tmp_path / "out", shard_size=2)
    reasons = {entry["key"]: entry["reason"] for entry in _bad(tmp_path / "out")}
    assert reasons == {
        "cat/zero": "the file is empty",
        "cat/text": "not an image that can be read",
        "cat/cut": reasons["cat/cut"],
        "cat/plain": "duplicate key",
        "stray": "no label: the image lies outside the class folders",
    }
    assert "truncated" in reasons["cat/cut"]
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["skipped"] == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("error")
def test_fail_stops_at_a_bad_item_by_name(class_folder, tmp_path, workers, capfd):
    (class_folder / "dog" / "bad.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"^dog/bad: the file is empty; mend or remove it"):
        prepare(str(class_folder), tmp_path / "out", on_bad="fail", workers=workers, shard_size=4)
    assert not (tmp_path / "out/train/manifest.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(UserError, match="interrupted"):
        ImageDataset(tmp_path / "out")
    # the same folder can be finished with the other policy, and then fail still refuses what was skipped
    assert prepare(str(class_folder), tmp_path / "out", workers=workers, shard_size=4)["train"]["skipped"] == 1
    with pytest.raises(UserError, match="dog/bad"):
        prepare(str(class_folder), tmp_path / "out", on_bad="fail", workers=workers, shard_size=4)
    assert "Exception ignored" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"), [(b"cat", "unknown label 'cat'"), (b"-1", "unknown label '-1'"), (None, "no label")]
)
def test_missing_and_unknown_labels_of_tars(tmp_path, make, text, reason):
    files = [("a.jpg", make.save(make.picture())), ("a.cls", b"0"), ("b.jpg", make.save(make.picture(2)))]
    make.tar(tmp_path / "x.tar", files + ([("b.cls", text)] if text else []))
    assert prepare(str(tmp_path / "x.tar"), tmp_path / "out")["train"]["count"] == 1
    assert _bad(tmp_path / "out")[0]["reason"].startswith(reason)
    with pytest.raises(UserError, match=f"b: {reason}"):
        prepare(str(tmp_path / "x.tar"), tmp_path / "out2", on_bad="fail")


def test_labels_beyond_the_known_classes_are_unknown(class_folder, tmp_path, make):
    prepare(str(class_folder), tmp_path / "out")
    make.tar(tmp_path / "out/train/more.tar", [("x.jpg", make.save(make.picture())), ("x.cls", b"3")])
    again = prepare(str(tmp_path / "out"), tmp_path / "again")["train"]
    assert (again["count"], again["skipped"], again["classes"]) == (20, 1, 3)
    assert _bad(tmp_path / "again") == [{"key": "x", "reason": "unknown label '3'"}]


def test_a_truncated_tar_as_source(tmp_path, make):
    tar = make.tar(
        tmp_path / "x.tar", [(f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", make.save(make.picture(i))), ("cls", b"0"))]
    )
    tar.write_bytes(tar.read_bytes()[: scan(tar)[4].offset + 10])
    assert prepare(str(tar), tmp_path / "out")["train"]["count"] == 2
    assert _bad(tmp_path / "out") == [{"key": "x.tar", "reason": "the tar is truncated inside a member"}]
    with pytest.raises(UserError, match=r"x\.tar: the tar is truncated"):
        prepare(str(tar), tmp_path / "out2", on_bad="fail")


def test_nothing_usable_is_refused_but_listed(tmp_path):
    (tmp_path / "in/cat").mkdir(parents=True)
    (tmp_path / "in/cat/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 items can be used, the first: cat/a: the file is empty"):
        prepare(str(tmp_path / "in"), tmp_path / "out")
    assert len(_bad(tmp_path / "out")) == 1


def test_changed_settings_or_content_are_refused(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out", size=16)
    with pytest.raises(UserError, match=r"size was 16, now 20.*choose another folder or delete"):
        prepare(str(class_folder), tmp_path / "out", size=20)
    (class_folder / "cat" / "000.jpg").unlink()
    with pytest.raises(UserError, match="the number of items, the content of the source"):
        prepare(str(class_folder), tmp_path / "out", size=16)


def test_a_folder_with_other_tars_is_refused(class_folder, tmp_path, make):
    (tmp_path / "out/train").mkdir(parents=True)
    make.tar(tmp_path / "out/train/precious.tar", [("a", b"1")])
    with pytest.raises(UserError, match="holds other tars"):
        prepare(str(class_folder), tmp_path / "out")


def test_a_finished_preparation_is_kept_and_a_damaged_shard_made_again(class_folder, tmp_path):
    out = tmp_path / "out"
    prepare(str(class_folder), out, shard_size=6)
    expected = _digests(out)
    assert prepare(str(class_folder), out, shard_size=6)["train"]["kept"] == 4
    tar = out / "train/shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 255
    tar.write_bytes(data)
    (out / "train/shard-000001.index.npz").unlink()
    assert prepare(str(class_folder), out, shard_size=6, workers=2)["train"]["kept"] == 2
    assert _digests(out) == expected


def test_an_interrupted_preparation_goes_on(tmp_path, make):
    """A real process with workers, killed with SIGKILL at several moments, ends with the same bytes."""
    root = tmp_path / "in"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(60):
            (root / name / f"{i}.png").write_bytes(make.save(make.picture(i, 200, 200), "PNG"))
    prepare(str(root), tmp_path / "straight", size=64, shard_size=8)
    out = tmp_path / "out"
    code = f"from tokar.data.prepare import prepare; prepare({str(root)!r}, {str(out)!r}, size=64, shard_size=8, workers=2)"
    interrupted = 0
    for wanted in (2, 9):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(out.glob("train/*.tar"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)  # the parent only: its workers must end by themselves
        interrupted += process.wait() == -signal.SIGKILL
        assert not (out / "train/manifest.json").exists()
    assert interrupted == 2
    assert 0 < prepare(str(root), out, size=64, shard_size=8)["train"]["kept"] < 15
    assert _digests(out) == _digests(tmp_path / "straight")
    assert verify(out) == []


def test_two_preparations_do_not_share_a_folder(class_folder, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    again = files.alone_in(tmp_path / "out/train", patience=0.1)
    with files.alone_in(tmp_path / "out/train"), pytest.raises(UserError, match="another process is writing here"), again:
        pytest.fail("the lock was given twice")
    assert prepare(str(class_folder), tmp_path / "out")["train"]["count"] == 20


def test_a_path_below_a_file_is_refused(class_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, a folder is needed here") as caught:
        prepare(str(class_folder), tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_complete(class_folder, tmp_path, monkeypatch, capfd):
    written = 0

    def write(self, data):
        nonlocal written
        written += len(data)
        if written > 25_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    original = files.HashingFile.write
    monkeypatch.setattr(write_shard.HashingFile, "write", write)
    with pytest.raises(UserError, match="the disk is full; free space and run again"):
        prepare(str(class_folder), tmp_path / "out", shard_size=4)
    finished = list((tmp_path / "out").rglob("*.tar"))
    assert 0 < len(finished) < 5
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    assert not (tmp_path / "out/train/manifest.json").exists()
    monkeypatch.undo()
    assert prepare(str(class_folder), tmp_path / "out", shard_size=4)["train"]["kept"] == len(finished)
    assert verify(tmp_path / "out") == []
    assert "Exception ignored" not in capfd.readouterr().err


def test_the_operating_system_says_full_inside_a_worker(class_folder, tmp_path):
    """A real refusal by the kernel: the file size limit of the process."""
    code = (
        "import resource; from tokar.data.prepare import prepare; from tokar.errors import UserError\n"
        "import webdataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        f"try: prepare({str(class_folder)!r}, {str(tmp_path / 'out')!r}, workers=2, shard_size=5)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert (
        done.stdout.strip()
        == f"{tmp_path / 'out' / 'train'}: the disk is full; free space and run again; what is finished is kept"
    )
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 8000


def test_a_killed_worker_is_one_line(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write_shard, "_convert", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare(str(class_folder), tmp_path / "out", workers=1, shard_size=5)


def test_a_source_for_each_split(class_folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(class_folder, tmp_path / f"set-{split}")
    done = prepare(str(tmp_path / "set-{split}"), tmp_path / "out", splits=["train", "test"])
    assert set(done) == {"train", "test"}
    with pytest.raises(UserError, match="set-val"):
        prepare(str(tmp_path / "set-{split}"), tmp_path / "out")


def test_splits_of_the_source_are_the_default(class_folder, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for split in ("train", "test"):
        shutil.copytree(class_folder, root / split)
    assert set(prepare(str(root), tmp_path / "out")) == {"train", "test"}
    with pytest.raises(UserError, match=r"no split 'val'.*it has: test, train"):
        prepare(str(root), tmp_path / "out2", splits=["train", "val"])
    with pytest.raises(UserError, match="no split 'val'"):
        prepare(str(class_folder), tmp_path / "out3", splits=["train", "val"])
    assert set(prepare(str(class_folder), tmp_path / "out4", splits=["val"])) == {"val"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"format": "gif"}, "unknown format 'gif'"),
        ({"quality": 101}, "quality must be 1…100"),
        ({"on_bad": "ignore"}, "choose skip or fail"),
    ],
)
def test_senseless_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare("digits", tmp_path / "out", **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_reaches_the_end(class_folder, tmp_path, workers):
    calls = []
    prepare(str(class_folder), tmp_path / "out", shard_size=6, workers=workers, progress=lambda *call: calls.append(call))
    assert calls[-1] == (20, 20)
    assert calls == sorted(calls)


def test_inspect_counts_and_draws(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out")
    found = inspect(tmp_path / "out", grid=tmp_path / "grid.png")["train"]
    assert found["per_class"] == {"cat": 7, "dog": 5, "owl": 8}
    assert found["sizes"] == {"24×24": 20}
    assert len(found["first_keys"]) == 5
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    np.testing.assert_array_equal(grid[:24, :24], decode(ImageDataset(tmp_path / "out").read(0)))
    assert inspect(tmp_path / "out" / "train") == {"train": found}
    with pytest.raises(UserError, match="no shards here"):
        inspect(tmp_path)


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda tar: _flip(tar, 1100), "checksum differs"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:3000]), "truncated"),
        (lambda tar: tar.unlink(), "shard is missing"),
        (lambda tar: index_path(tar).unlink(), "index is missing or damaged"),
        (lambda tar: index_path(tar).write_bytes(b"x"), "index is missing or damaged"),
        (lambda tar: shutil.copy(tar.with_name("shard-000001.tar"), tar), "does not describe its tar and is older"),
        (lambda tar: shutil.copy(tar.with_name("shard-000001.tar"), tar), "is also in shard-000000.tar"),
        (lambda tar: shutil.copy(tar, tar.with_name("extra.tar")), "not in the manifest"),
        (lambda tar: tar.with_name("manifest.json").unlink(), "no manifest.json"),
        (lambda tar: tar.with_name("manifest.json").write_text("{"), "damaged manifest"),
    ],
)
def test_verify_names_every_damage(class_folder, tmp_path, harm, message):
    prepare(str(class_folder), tmp_path / "out", shard_size=6)
    assert verify(tmp_path / "out", decode_all=True) == []
    time.sleep(0.01)
    harm(tmp_path / "out/train/shard-000000.tar")
    assert any(message in line for line in verify(tmp_path / "out")), verify(tmp_path / "out")


def test_verify_finds_labels_out_of_range(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out")
    path = tmp_path / "out/train/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "classes": ["cat", "dog"]}))
    assert any("unknown label '2'" in line for line in verify(tmp_path / "out"))


def test_a_deleted_shard_is_made_again(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out", shard_size=5)
    tar = tmp_path / "out" / "train" / "shard-000001.tar"
    before = tar.read_bytes()
    tar.unlink()
    prepare(str(class_folder), tmp_path / "out", shard_size=5)
    assert tar.read_bytes() == before
