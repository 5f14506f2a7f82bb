import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from tokar.errors import UserError
from tokar.evaluate.images import count_samples, load_samples, save_folder, save_grid, save_npz


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 6, 5, 3), dtype=torch.uint8, generator=generator)
    return {"image": pixels, "label": torch.arange(7) % 3}


def batches(samples, size=3):
    return [{key: value[start : start + size] for key, value in samples.items()} for start in range(0, 7, size)]


def gathered(path, size):
    parts = list(load_samples(path, size))
    assert all(len(part["image"]) == size for part in parts[:-1])
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("form", ["npz", "folder"])
@pytest.mark.parametrize("size", [2, 7, 64])
def test_samples_come_back_from_disk(tmp_path, samples, form, size):
    path = save_npz(batches(samples), tmp_path / "x.npz", 7) if form == "npz" else save_folder(batches(samples), tmp_path / "x")
    back = gathered(path, size)
    assert torch.equal(back["image"], samples["image"])
    assert torch.equal(back["label"], samples["label"])
    assert count_samples(path) == 7


def test_npz_is_what_numpy_reads_and_the_same_bytes_twice(tmp_path, samples):
    one, two = (save_npz(batches(samples), tmp_path / name, 7) for name in ("a.npz", "b.npz"))
    arrays = np.load(one)
    np.testing.assert_array_equal(arrays["arr_0"], samples["image"].numpy())
    np.testing.assert_array_equal(arrays["arr_1"], samples["label"].numpy())
    assert one.read_bytes() == two.read_bytes()


def test_npz_of_numpy_without_labels_is_read(tmp_path, samples):
    np.savez_compressed(tmp_path / "x.npz", samples["image"].numpy())
    assert list(gathered(tmp_path / "x.npz", 4)) == ["image"]


def test_a_wrong_count_leaves_no_file(tmp_path, samples):
    with pytest.raises(UserError, match="7 images came, 8 were announced"):
        save_npz(batches(samples), tmp_path / "x.npz", 8)
    assert not list(tmp_path.iterdir())


def test_unreadable_samples_are_refused(tmp_path, samples):
    np.savez(tmp_path / "float.npz", samples["image"].float().numpy())
    np.savez(tmp_path / "named.npz", images=samples["image"].numpy())
    np.savez(tmp_path / "labels.npz", samples["image"].numpy(), np.zeros(3, np.int64))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty").mkdir()
    save_folder(batches(samples), tmp_path / "sizes")
    Image.new("RGB", (9, 9)).save(tmp_path / "sizes" / "000003.png")
    save_folder(batches(samples), tmp_path / "broken")
    (tmp_path / "broken" / "000003.png").write_bytes(b"")
    save_folder(batches(samples), tmp_path / "unlabelled")
    (tmp_path / "unlabelled" / "labels.json").write_text(json.dumps({"000000.png": 1}))
    words = {
        "float.npz": "arr_0 is float32",
        "named.npz": "no array arr_0",
        "labels.npz": "not one label for each of 7",
        "text.npz": "no readable samples",
        "nowhere.npz": "no readable samples",
        "empty": "has no images",
        "sizes": r"000003\.png: is \(9, 9\)",
        "broken": r"000003\.png: no readable image",
        "unlabelled": "every image a label",
    }
    for name, word in words.items():
        with pytest.raises(UserError, match=word):
            list(load_samples(tmp_path / name))


def test_a_truncated_array_is_refused(tmp_path, samples):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (7, 6, 5, 3)})
        file.write(samples["image"][:6].numpy().tobytes())
    with pytest.raises(UserError, match="ends before its last image"):
        list(load_samples(tmp_path / "x.npz"))


def test_grid_holds_every_image_in_its_place(tmp_path, samples):
    sheet = np.asarray(Image.open(save_grid(samples["image"], tmp_path / "grid.png", columns=3, scale=2)))
    assert sheet.shape == (3 * 12 + 4, 3 * 10 + 4, 4)
    tile = sheet[14:26, 12:22]  # second row, second column: image 4
    np.testing.assert_array_equal(tile[::2, ::2, :3], samples["image"][4].numpy())
    np.testing.assert_array_equal(tile[1::2, 1::2, :3], samples["image"][4].numpy())
    assert (sheet[12:14] == 0).all()
    assert (sheet[28:, 24:] == 0).all(), "places without an image stay transparent"


def test_grid_is_about_square(tmp_path, samples):
    assert Image.open(save_grid(samples["image"], tmp_path / "grid.png")).size == (3 * 5 + 4, 3 * 6 + 4)
