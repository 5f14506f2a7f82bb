import io
import tarfile

import numpy as np
import pytest
from PIL import Image


def picture(seed=0, height=24, width=24):
    """Smooth pixels, so that JPEG keeps them recognisable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(pixels_or_image, format="JPEG", **options):
    image = pixels_or_image if isinstance(pixels_or_image, Image.Image) else Image.fromarray(pixels_or_image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, files, truncate=0):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if truncate:
        path.write_bytes(path.read_bytes()[:truncate])
    return path


@pytest.fixture(scope="session")
def make():
    """Helpers: `picture(seed, height, width)`, `save(pixels, format, …)`, `tar(path, files)`."""

    class Helpers:
        pass

    Helpers.picture, Helpers.save, Helpers.tar = staticmethod(picture), staticmethod(save), staticmethod(write_tar)
    return Helpers


@pytest.fixture
def class_folder(tmp_path):
    """Three classes of 7, 5 and 8 JPEGs of 24×24."""
    root = tmp_path / "images"
    for label, (name, count) in enumerate({"cat": 7, "dog": 5, "owl": 8}.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.jpg").write_bytes(save(picture(100 * label + i)))
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKAR_CACHE", str(tmp_path / "cache"))
