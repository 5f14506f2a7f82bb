"""How samples build up: what is shown after some of the steps of a plan."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import tiny
from tokar.data.stream import to_uint8
from tokar.evaluate.reveal import HIDDEN, reveal, stages
from tokar.models.generators.orders import next_token, raster, sequence


def codes_of(tokenizer, count=2):
    return torch.randint(16, (count, tokenizer.layout.total_tokens), generator=torch.Generator().manual_seed(0))


def test_places_of_a_grid_stay_grey_until_their_token_is_there(tmp_path):
    tokenizer = tiny("vqgan").eval()
    (grid,) = (stream.grid for stream in tokenizer.layout.streams)
    count = grid[0] * grid[1]
    backwards = next_token([(place // grid[1], place % grid[1]) for place in range(count)], range(count - 1, -1, -1), 1, grid)
    codes = codes_of(tokenizer)
    picture = reveal(tokenizer, backwards, codes)
    shown = picture.images.unflatten(0, (2, -1))
    assert list(picture.columns) == [str(stop) for stop in stages(backwards)]
    assert picture.columns[-1] == str(count)
    assert torch.equal(shown[:, -1], to_uint8(tokenizer.decode(codes)))
    side = shown.shape[2] // grid[0]
    for column, done in enumerate(map(int, picture.columns)):
        for place in range(count):
            row, left = place // grid[1] * side, place % grid[1] * side
            cell, whole = (shown[:, at, row : row + side, left : left + side] for at in (column, -1))
            assert torch.equal(cell, whole) if place >= count - done else (cell == HIDDEN).all()
    with Image.open(picture.save(tmp_path / "partial.png")) as image:
        assert json.loads(image.info["about"]) == {"columns": list(picture.columns), "note": picture.note}


def test_scales_in_order_are_decoded_alone_and_a_row_that_is_no_image_is_not_shown():
    scales = tiny("multiscale").eval()
    codes = codes_of(scales)
    picture = reveal(scales, sequence(scales.layout.total_tokens), codes)
    assert list(picture.columns) == ["1 · scale0", "5 · scale1", "21 · scale2"]
    first = picture.images.unflatten(0, (2, 3))[:, 0]
    with torch.no_grad():
        assert torch.equal(first, to_uint8(scales.decode_partial(codes, 1)))
    row = tiny("gigatok").eval()
    assert reveal(row, sequence(row.layout.total_tokens), codes_of(row)) is None


@pytest.mark.parametrize(("side", "expected"), [(2, [1, 2, 3, 4]), (4, [2, 4, 6, 8, 10, 12, 14, 16])])
def test_stages_are_even_and_end_with_the_last_step(side, expected):
    assert stages(raster((side, side))) == expected
    assert np.diff([0, *expected]).min() > 0
