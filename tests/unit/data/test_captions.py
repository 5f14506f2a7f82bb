"""Captions beside images, and their features beside codes."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tokar.data.captions import Captions
from tokar.data.codes import CodeDataset, CodeWriter
from tokar.data.prepare import prepare, verify
from tokar.data.shards import ImageDataset
from tokar.errors import UserError
from tokar.models.tokenizers.layout import raster_layout

TEXT = {"path": "t5", "tokens": 3, "features": 4}


def write_tar(path, samples):
    """`{key: caption}`; `None`: an image without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, caption in samples.items():
            picture = io.BytesIO()
            Image.new("RGB", (8, 8)).save(picture, "png")
            members = {"png": picture.getvalue(), **({} if caption is None else {"txt": caption.encode()})}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_folder(folder, names, captioned=3):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name}.png")
        if number < captioned:
            (folder / f"{name}.txt").write_text(f"caption of {name}\n")


def read_all(folder):
    images = ImageDataset(folder)
    captions = Captions(images)
    return {images.key(i): captions.read(i) for i in range(len(images))}, images


@pytest.mark.parametrize("names", [("cat/a", "cat/b.c", "dog/a"), ("a", "b.c", "d")], ids=["classes", "no classes"])
def test_preparation_takes_captions_along(tmp_path, names):
    """From a folder, and from the tars that it wrote; images without folders need no class then."""
    write_folder(tmp_path / "in", names)
    summary = prepare(str(tmp_path / "in"), tmp_path / "out")["train"]
    assert (summary["count"], summary["skipped"]) == (3, 0)
    found, images = read_all(tmp_path / "out")
    assert found == {name.replace(".", "_"): f"caption of {name}" for name in names}
    assert sorted(images.labels.tolist()) == ([0, 0, 1] if "/" in names[0] else [-1, -1, -1])
    prepare(str(tmp_path / "out" / "train"), tmp_path / "again", size=4)
    assert read_all(tmp_path / "again")[0] == found
    assert verify(tmp_path / "again") == []


def test_a_text_that_is_no_caption_and_an_image_that_has_none(tmp_path):
    write_folder(tmp_path / "in", ["cat/a", "cat/b"], captioned=1)
    (tmp_path / "in/cat/notes.txt").write_text("no picture has this name")
    summary = prepare(str(tmp_path / "in"), tmp_path / "out")["train"]
    assert (summary["count"], summary["skipped"]) == (2, 1)
    with pytest.raises(UserError, match=r"'cat/b' has no \.txt"):
        read_all(tmp_path / "out")


def test_every_image_has_its_caption(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", {"a": "a red boat\n", "b": "ein grünes Boot"})
    write_tar(tmp_path / "train" / "1.tar", {"a": "another a"})
    captions = Captions(ImageDataset(tmp_path, "train"))
    assert [captions.read(i) for i in (0, 2, 1)] == ["a red boat", "another a", "ein grünes Boot"]


def test_an_image_without_caption_is_named(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", {"a": "a red boat", "b": None})
    with pytest.raises(UserError, match=r"'b' has no \.txt"):
        Captions(ImageDataset(tmp_path, "train")).read(1)


@pytest.fixture
def writer(tmp_path):
    layout = raster_layout((2, 3), 512, 8, 4).to_dict()
    return CodeWriter(tmp_path / "codes", layout, "a" * 64, 2, {}, count=5, classes=[], shard_size=2, text=TEXT)


def write(writer, text):
    for part in writer.pending():
        rows = slice(part.start, part.stop)
        n = part.stop - part.start
        writer.write(part.shard, np.zeros((n, 2, 6)), np.full(n, -1), [f"key{i}" for i in range(n)], text[rows])


def test_features_lie_beside_the_codes(writer):
    text = np.random.default_rng(0).normal(size=(5, 3, 5))
    write(writer, text)
    writer.finish()
    dataset = CodeDataset(writer.folder)
    assert dataset.text == TEXT
    order = np.array([4, 0, 3])
    batch = dataset.fetch(order, np.zeros(3, dtype=np.int64), 0)
    assert batch["text"].dtype == np.float16
    np.testing.assert_array_equal(batch["text"], text[order].astype(np.float16))
    assert batch["codes"].shape == (3, 6)
    (writer.folder / "text-000001.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="missing or truncated"):
        CodeDataset(writer.folder)


@pytest.mark.parametrize("text", [None, np.zeros((2, 3, 4))])
def test_text_that_was_not_declared_so_is_refused(writer, text):
    with pytest.raises(UserError, match="declared"):
        writer.write(0, np.zeros((2, 2, 6)), np.zeros(2), ["a", "b"], text)
