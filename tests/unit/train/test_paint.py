"""In- and out-painting: what is given stays on every scale, the rest is drawn; other scales than trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import tiny
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.generators.base import Generator
from tokar.models.generators.flexvar import FlexVAR
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.open import OpenedGenerator
from tokar.models.samplers.decode import sample
from tokar.models.tokenizers.base import Tokenizer
from tokar.train.paint import canvas, half, kept_tokens, read_image

CPU = torch.device("cpu")


def opened(kind: str) -> OpenedGenerator:
    tokenizer: Tokenizer = tiny(kind)
    layout, sizes = tokenizer.layout, {"dim": 32, "layers": 1, "heads": 2}
    torch.manual_seed(0)
    generator: Generator
    if kind == "vqgan":
        generator = NextToken(16, 5, grid=layout.streams[0].grid, multiple_of=16, **sizes)
    else:
        family = {"multiscale": NextScale, "flexvar": FlexVAR}[kind]
        generator = family(16, 5, [stream.grid for stream in layout.streams], embed_dim=4, **sizes)
        generator.bind(tokenizer)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return OpenedGenerator(generator.eval(), tokenizer, {}, {})


def config_of(*overrides: str) -> object:
    return compose("sample", ["model=runs/some", *overrides]).typed


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "given.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "given.png"


@pytest.mark.parametrize("kind", ["vqgan", "multiscale", "flexvar"])
@pytest.mark.parametrize("keep", ["top", "right", "center", "border"])
def test_what_is_kept_stays_and_the_rest_is_drawn(picture: Path, kind: str, keep: str) -> None:
    model, given = canvas(config_of(f"given={picture}", f"keep={keep}"), opened(kind), CPU)
    fixed = given >= 0
    condition = torch.tensor([0, 1, 2])
    drawn = sample(model.generator, condition, seed=0, guidance=2.0, given=given)
    free = sample(model.generator, condition, seed=0, guidance=2.0)
    assert torch.equal(drawn[:, fixed[0]], given[fixed].expand(3, -1))
    assert (drawn[:, ~fixed[0]] != drawn[:1, ~fixed[0]]).any()
    assert not torch.equal(drawn, free)
    assert torch.equal(drawn, sample(model.generator, condition, seed=0, guidance=2.0, given=given, cache=False))
    pixels = torch.from_numpy(np.asarray(Image.open(picture)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    codes = model.tokenizer.encode(pixels).codes
    assert torch.equal(given[fixed], codes[fixed])


def test_an_image_of_another_size_is_covered(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    covered = read_image(tmp_path / "wide.png", (32, 32))
    assert covered.shape == (32, 32, 3)
    assert (covered[:, 1:-1] == 255).all()  # bicubic: the outermost columns mix with their neighbours


def test_every_scale_keeps_its_part() -> None:
    layout = tiny("multiscale").layout  # 1, 2x2, 4x4
    top = kept_tokens(layout, half("top", (32, 32)))[0].tolist()
    assert top == [True, *[True, True, False, False], *[True] * 8, *[False] * 8]
    right = kept_tokens(layout, half("right", (32, 32)))[0].tolist()
    assert right == [True, *[False, True] * 2, *[False, False, True, True] * 4]
    centre = kept_tokens(layout, half("center", (32, 32)))[0]
    border = kept_tokens(layout, half("border", (32, 32)))[0]
    assert torch.equal(centre, ~border)
    assert centre.nonzero().flatten().tolist() == [10, 11, 14, 15]


def test_a_mask_says_what_is_drawn(picture: Path) -> None:
    mask = picture.parent / "mask.png"
    _, given = canvas(config_of(f"given={picture}", f"mask={mask}"), opened("vqgan"), CPU)
    assert (given[0] < 0).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_nothing_is_given() -> None:
    model = opened("vqgan")
    assert canvas(config_of(), model, CPU) == (model, None)


def test_flexvar_draws_other_scales(picture: Path) -> None:
    model, given = canvas(config_of("scales=[2,3,[4,6]]", f"given={picture}", "keep=left"), opened("flexvar"), CPU)
    assert given.shape == (1, 4 + 9 + 24)
    codes = sample(model.generator, torch.tensor([1]), seed=0, given=given).clone()
    assert model.tokenizer.decode(codes).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("vqgan", ["keep=top"], "keep: says what stays of no image; give given=IMAGE"),
        ("vqgan", ["given=GIVEN"], "given: needs one of keep and mask"),
        ("vqgan", ["given=GIVEN", "keep=top", "mask=GIVEN"], "given: needs one of keep and mask"),
        ("vqgan", ["given=missing.png", "keep=top"], r"missing\.png"),
        ("vqgan", ["scales=[1,2]"], "a NextToken draws the scales it was trained on"),
        ("multiscale", ["scales=[1,2]"], "a NextScale draws the scales it was trained on"),
        ("flexvar", ["scales=[2,6,4]"], "do not end with the finest"),
        ("flexvar", ["scales=[1,4]"], r"begin with \(2, 2\)"),
    ],
)
def test_what_cannot_work_is_refused(picture: Path, kind: str, overrides: list[str], message: str) -> None:
    given = [override.replace("GIVEN", str(picture)) for override in overrides]
    with pytest.raises((UserError, FileNotFoundError), match=message):
        canvas(config_of(*given), opened(kind), CPU)


def test_tokens_without_a_place_are_refused(picture: Path) -> None:
    with pytest.raises(UserError, match="have no place in the image; take a tokenizer of grids"):
        kept_tokens(tiny("titok").layout, half("top", (32, 32)))
