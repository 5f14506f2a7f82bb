import pytest
import torch
from tokar.models.tokenizers.augment import DiffAug, recolour, translate


@pytest.fixture
def image():
    return torch.rand(64, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_translation_moves_whole_pixels_and_fills_with_zero():
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4).expand(2, 3, 3, 4)
    moved = translate(image, torch.tensor([1, -2]), torch.tensor([-1, 0]))
    down_left = torch.tensor([[0.0, 0, 0, 0], [2, 3, 4, 0], [6, 7, 8, 0]])
    up = torch.tensor([[9.0, 10, 11, 12], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(moved, torch.stack([down_left, up])[:, None].expand(2, 3, 3, 4))


def test_colour_by_hand(image):
    draws = torch.rand(3, len(image))
    changed = recolour(image, *draws)
    one = image[5] + draws[0, 5] - 0.5
    one = one.mean(0) + (one - one.mean(0)) * 2 * draws[1, 5]
    one = one.mean() + (one - one.mean()) * (0.5 + draws[2, 5])
    torch.testing.assert_close(changed[5], one)
    neutral = torch.full((len(image),), 0.5)
    torch.testing.assert_close(recolour(image, *[neutral] * 3), image)


def test_translation_reaches_its_share_and_no_further():
    torch.manual_seed(0)
    marks = torch.zeros(2000, 3, 16, 12)
    marks[:, :, 8, 6] = 1
    places = DiffAug(translation=0.25, cutout=0.0)(marks).mean(1).flatten(1).argmax(1)  # colour keeps the brightest place
    rows, columns = places // 12, places % 12
    assert (rows.min(), rows.max()) == (8 - 4, 8 + 4)
    assert (columns.min(), columns.max()) == (6 - 3, 6 + 3)
    assert len(places.unique()) == 9 * 7


def test_cutout_covers_its_share_clipped_at_the_border():
    torch.manual_seed(0)
    zeros = (DiffAug(translation=0.0, cutout=0.2)(torch.ones(500, 3, 20, 10)) == 0).all(1)
    counts = zeros.sum((1, 2))
    assert counts.max() == 4 * 2
    assert counts.min() >= 2 * 1
    inner = zeros[counts == 8]
    assert (inner.any(2).sum(1) == 4).all()
    assert (inner.any(1).sum(1) == 2).all()
    assert zeros.any(0).all(), "every place can be cut"


def test_a_seed_decides_everything(image):
    augment = DiffAug()
    torch.manual_seed(7)
    first, second = augment(image), augment(image)
    torch.manual_seed(7)
    torch.testing.assert_close(augment(image), first, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_rests_out_of_training_and_at_probability_zero(image):
    assert DiffAug().eval()(image) is image
    assert DiffAug(probability=0.0)(image) is image


def test_gradients_pass_where_pixels_stayed(image):
    torch.manual_seed(0)
    image.requires_grad_(True)
    augment = DiffAug(translation=0.0)
    augment(image).square().sum().backward()
    assert image.grad.isfinite().all()
    assert (image.grad.abs().sum(1) > 0).float().mean() > 0.9
    moved = image.detach()[:2].requires_grad_(True)
    translate(moved, torch.tensor([3, 0]), torch.tensor([0, -2])).sum().backward()
    expected = torch.ones(2, 3, 16, 12)
    expected[0, :, -3:] = 0
    expected[1, :, :, :2] = 0
    torch.testing.assert_close(moved.grad, expected)
