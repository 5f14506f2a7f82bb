import os

import pytest
import torch
from PIL import Image
from tiny_tokenizers import tiny
from tokar.errors import UserError
from tokar.evaluate.crops import DETAILS, busiest, crop_side, detail_energy, evaluate_crops, text_images
from tokar.evaluate.protocol import Result
from tokar.evaluate.report.page import write_report
from tokar.evaluate.report.runs import read_run


def flat(count=3, size=32):
    return torch.full((count, size, size, 3), 100, dtype=torch.uint8)


def test_the_busiest_window_is_found():
    images = flat()
    images[1, 10:14, 20:24] = torch.tensor([[0, 255] * 2, [255, 0] * 2] * 2, dtype=torch.uint8)[..., None]
    (quiet, _, _, _), (energy, number, row, column), _ = busiest(images, 8, start=5)
    assert (quiet, number) == (0, 6)
    assert row <= 10
    assert row + 8 >= 14
    assert column <= 20
    assert column + 8 >= 24
    assert energy == detail_energy(images, 8)[1].max()


def test_energy_is_the_mean_squared_difference():
    image = flat(1)
    image[0, :, 16:] = 110  # one column of edges, of 10² each
    assert detail_energy(image, 16)[0, 0, 8].item() == pytest.approx(100 / 16)
    assert detail_energy(image, 16)[0, 0, 16].item() == 0


@pytest.mark.parametrize(("size", "side"), [((32, 32), 16), ((256, 256), 64), ((16, 24), 16), ((8, 8), 8)])
def test_a_crop_is_a_quarter_or_sixteen_pixels(size, side):
    assert crop_side(size) == side


def test_text_is_drawn_in_every_size_that_fits():
    pages = text_images((32, 48))
    assert pages.shape == (6, 32, 48, 3)
    assert all(page.float().std() > 20 for page in pages)
    assert torch.equal(pages, text_images((32, 48)))
    with pytest.raises(UserError, match="too small for text"):
        text_images((8, 8))


def batches(size):
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [{"image": part} for part in (images // torch.arange(1, 21)[:, None, None, None]).to(torch.uint8).split(size)]


def test_crops_depend_on_the_images_alone(tmp_path):
    one, other, again = (
        evaluate_crops(tiny(kind), batches(size), data={"source": "noise"})
        for kind, size in (("vqgan", 20), ("multiscale", 7), ("vqgan", 3))
    )
    assert one.result.protocol_id == other.result.protocol_id
    assert one.result.numbers == pytest.approx(again.result.numbers)
    assert one.result.numbers != pytest.approx(other.result.numbers)
    assert all(torch.equal(a.original, b.original) for a, b in zip(one.crops, other.crops, strict=True))
    names = [crop.name for crop in one.crops]
    assert names == [f"detail {i}" for i in range(1, DETAILS + 1)] + [f"text {i}" for i in range(1, 7)]
    details = [one.result.numbers[f"detail {i}/psnr"] for i in range(1, DETAILS + 1)]
    assert one.result.numbers["detail/psnr"] == pytest.approx(sum(details) / DETAILS)
    assert Image.open(one.draw(tmp_path / "crops.png")).size == (12 * 16, 2 * 16)


def run_of(folder, kind):
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: tokenizer\n")
    crops = evaluate_crops(tiny(kind), batches(20), data={"source": "noise"})
    crops.result.save(folder / "evaluation" / "crops-1.json")
    crops.draw(folder / "evaluation" / "crops-1_crops.png")
    return crops


def test_the_report_shows_tokenizers_side_by_side(tmp_path):
    made = {kind: run_of(tmp_path / kind, kind) for kind in ("vqgan", "multiscale")}
    page = write_report([tmp_path / kind for kind in made], tmp_path / "report.html").read_text()
    assert page.count('class="plain crops"') == 1
    section = page[page.index('id="details"') :]
    section = section[: section.index("</table>")]
    assert section.count("<tr>") == 13
    assert section.count('class="pixelated"') == 12 * 3  # the original once, each tokenizer once
    assert section.count('width="128"') == 36  # 16 pixels, each eight times as large
    for crops in made.values():
        assert f"{crops.result.numbers['text 2/psnr']:.2f} dB" in section


def test_the_headline_of_a_run_is_no_crop(tmp_path):
    run_of(tmp_path / "vqgan", "vqgan")
    Result("linear_probe", {"accuracy": 0.625, "cross_entropy": 1.0}, {}).save(tmp_path / "vqgan" / "evaluation" / "a.json")
    os.utime(tmp_path / "vqgan" / "evaluation" / "a.json", (0, 0))
    page = write_report([tmp_path / "vqgan"], tmp_path / "report.html").read_text()
    card = page[page.index('class="card"') :]
    assert "0.625" in card[: card.index("</article>")]
    assert "Detail" not in card[: card.index("</article>")]


def test_crops_without_their_picture_are_told(tmp_path, capsys):
    run_of(tmp_path / "vqgan", "vqgan")
    (tmp_path / "vqgan" / "evaluation" / "crops-1_crops.png").unlink()
    page = write_report([tmp_path / "vqgan"], tmp_path / "report.html").read_text()
    assert 'id="details"' not in page
    assert "crops-1_crops.png left out" in capsys.readouterr().err


def test_pictures_of_evaluations_are_shown_but_not_the_sheet_of_crops(tmp_path):
    crops = run_of(tmp_path / "vqgan", "vqgan")
    crops.draw(tmp_path / "vqgan" / "evaluation" / "prefixes-1_images.png")
    assert [path.name for path in read_run(tmp_path / "vqgan").pictures] == ["prefixes-1_images.png"]
