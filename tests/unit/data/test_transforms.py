import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokar.data.images import centre_crop, resize_shorter
from tokar.data.prepare import prepare
from tokar.data.randoms import hashes, uniforms
from tokar.data.shards import ImageDataset
from tokar.data.transforms import Augment, FlipPair, TenCrop, flip_pair, random_crop, ten_crop


def _fetch(dataset, indices, epoch=0, seed=0):
    indices = np.asarray(indices)
    return dataset.fetch(indices, np.full_like(indices, epoch), seed)["image"]


@pytest.fixture
def dataset(class_folder, tmp_path):
    prepare(str(class_folder), tmp_path / "out")
    return ImageDataset(tmp_path / "out")


@given(
    seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=30)
)
def test_random_numbers_depend_on_seed_epoch_and_sample_alone(seed, epoch, indices):
    epochs, indices = np.full(len(indices), epoch), np.array(indices)
    numbers = uniforms(seed, epochs, indices, 4)
    assert numbers.shape == (len(indices), 4)
    assert ((numbers >= 0) & (numbers < 1)).all()
    for row in range(len(indices)):
        np.testing.assert_array_equal(uniforms(seed, epochs[row : row + 1], indices[row : row + 1], 4)[0], numbers[row])


def test_random_numbers_are_uniform_and_uncorrelated():
    n = 20_000
    arange, zero = np.arange(n), np.zeros(n, dtype=np.int64)
    columns = [
        uniforms(0, zero, arange, 2),
        uniforms(1, zero, arange, 2),
        uniforms(0, zero + 1, arange, 2),
        uniforms(0, arange, zero, 2),
    ]
    numbers = np.concatenate(columns, axis=1)
    for column in numbers.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 44  # chi-square, 19 degrees of freedom, p = 0.001
    correlation = np.corrcoef(numbers.T) - np.eye(8)
    assert np.abs(correlation).max() < 4 / np.sqrt(n)
    assert np.abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 4 / np.sqrt(n)
    assert len(np.unique(hashes(0, zero, arange, 2))) == 2 * n


def test_augmentation_is_seeded_by_seed_epoch_and_sample(dataset):
    augmented = dataset.with_transform(Augment(16, "random", flip=True))
    everything = _fetch(augmented, range(20))
    np.testing.assert_array_equal(_fetch(augmented, [7, 3]), everything[[7, 3]])
    for other in (_fetch(augmented, range(20), epoch=1), _fetch(augmented, range(20), seed=1)):
        assert sum(not np.array_equal(a, b) for a, b in zip(everything, other, strict=True)) >= 18


def test_flips_mirror_about_half_and_nothing_else(dataset):
    plain, flipped = (_fetch(dataset.with_transform(Augment(24, "center", flip=flip)), range(20)) for flip in (False, True))
    mirrored = [np.array_equal(b, a[:, ::-1]) and not np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert sum(mirrored) + sum(same) == 20
    assert 4 <= sum(mirrored) <= 16


def test_the_flip_does_not_change_the_crop(dataset):
    plain, flipped = (_fetch(dataset.with_transform(Augment(16, "random", flip=flip)), range(20)) for flip in (False, True))
    for a, b in zip(plain, flipped, strict=True):
        assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)


def test_the_fast_path_equals_the_slow_one(dataset):
    direct, slow = Augment(24, "center", flip=True), Augment(24, "center", flip=True)
    slow.direct = False
    np.testing.assert_array_equal(*(_fetch(dataset.with_transform(transform), range(20)) for transform in (direct, slow)))


@pytest.mark.parametrize("shape", [(70, 50), (40, 90), (16, 16)])
def test_random_crops_are_windows_of_an_adm_resize(make, shape):
    picture, sides, ends = make.picture(3, *shape), set(), set()
    for numbers in np.random.default_rng(0).random((200, 4)):
        crop = random_crop(picture, 16, numbers)
        side = 16 + int(numbers[0] * 5)
        resized = resize_shorter(picture, side)
        top, left = int(numbers[1] * (resized.shape[0] - 15)), int(numbers[2] * (resized.shape[1] - 15))
        np.testing.assert_array_equal(crop, resized[top : top + 16, left : left + 16])
        sides.add(side)
        ends |= {end for end, at in (("top", top == 0), ("bottom", top == len(resized) - 16), ("left", left == 0)) if at}
    assert sides == {16, 17, 18, 19, 20}  # S … S/0.8, both ends reached
    assert ends == {"top", "bottom", "left"}


def test_extreme_random_numbers_stay_inside(make):
    for value in (0.0, np.nextafter(1.0, 0.0)):
        assert random_crop(make.picture(0, 33, 21), 16, np.full(4, value)).shape == (16, 16, 3)


def test_ten_crop_is_torchvisions_order(make):
    picture = make.picture(4, 60, 45)
    views = ten_crop(picture, 20, 1.1)
    base = centre_crop(resize_shorter(picture, 22), 22)
    assert views.shape == (10, 20, 20, 3)
    for offset, image in ((0, base), (5, base[:, ::-1])):
        expected = [image[:20, :20], image[:20, 2:], image[2:, :20], image[2:, 2:], image[1:21, 1:21]]
        np.testing.assert_array_equal(views[offset : offset + 5], np.stack(expected))
    # every corner appears with its mirror image
    np.testing.assert_array_equal(views[6], views[0][:, ::-1])
    np.testing.assert_array_equal(views[5], views[1][:, ::-1])
    np.testing.assert_array_equal(views[9], views[4][:, ::-1])


def test_ten_crop_sizes_of_the_published_protocol(make):
    picture = make.picture(0, 300, 300)
    base = centre_crop(resize_shorter(picture, 281), 281)  # int(256 · 1.1)
    views = ten_crop(picture, 256)
    np.testing.assert_array_equal(views[3], base[25:, 25:])
    np.testing.assert_array_equal(views[4], base[12:268, 12:268])


def test_views_arrive_in_batches(dataset):
    ten, pair = (_fetch(dataset.with_transform(transform), [4, 2]) for transform in (TenCrop(16), FlipPair(16)))
    assert (ten.shape, pair.shape) == ((2, 10, 16, 16, 3), (2, 2, 16, 16, 3))
    pixels = np.asarray(Image.fromarray(_fetch(dataset, [2])[0]))
    np.testing.assert_array_equal(ten[1], ten_crop(pixels, 16))
    np.testing.assert_array_equal(pair[1], flip_pair(pixels, 16))
    np.testing.assert_array_equal(pair[:, 1], pair[:, 0, :, ::-1])


def test_an_unknown_crop_is_refused():
    with pytest.raises(ValueError, match="choose center, random or none"):
        Augment(16, "centre")
