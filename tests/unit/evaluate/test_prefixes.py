import pytest
import torch
from PIL import Image
from tiny_tokenizers import tiny
from tokar.errors import UserError
from tokar.evaluate.measures import Frechet
from tokar.evaluate.prefixes import evaluate_prefixes, prefixes_of
from tokar.evaluate.ranks import Pace
from tokar.evaluate.reconstruction import evaluate_tokenizer
from tokar.evaluate.score import SampleScore
from tokar.models.tokenizers.base import Tokenizer, TokenizerOutput
from tokar.models.tokenizers.layout import raster_layout
from tokar.models.tokenizers.quantizers.base import Quantized, Quantizer
from tokar.models.tokenizers.quantizers.compose import ResidualQuantizer
from torch import nn


class Quarters(Quantizer):
    """Four values, evenly spread over [-1, 1]: each residual level leaves a quarter of the error."""

    codebook_size, dim = 64, 3

    def forward(self, z):
        indices = ((z + 1) * 2).long().clamp(0, 3)
        packed = indices[:, 0] * 16 + indices[:, 1] * 4 + indices[:, 2]
        return Quantized(self.embed(packed), packed, {})

    def embed(self, indices):
        parts = torch.stack([indices // 16, indices // 4 % 4, indices % 4], 1)
        return (parts.float() + 0.5) / 2 - 1


class Pixels(Tokenizer):
    """Every pixel is a token, quantized level by level."""

    def __init__(self, levels=3):
        super().__init__()
        self.quantizer = ResidualQuantizer({f"level{k}": Quarters() for k in range(levels)}, shrink=0.25)
        self.layout = raster_layout((16, 16), 64, 3, 1).parallel(self.quantizer.streams)
        self.scale = nn.Linear(1, 1)

    def encode(self, image):
        quantized = self.quantizer(image)
        return TokenizerOutput(quantized.indices.flatten(1), image, quantized.latent)

    def embed(self, codes):
        return self.quantizer.embed(codes.unflatten(1, (len(self.layout.streams), 16, 16)))

    def decode(self, latent):
        return latent if latent.is_floating_point() else self.embed(latent)

    def last_layer(self):
        return self.scale


def batches(images, size=9):
    return [{"image": part} for part in images.split(size)]


def test_each_level_of_a_residual_quantizer_adds_twelve_decibels(network, images, tmp_path):
    measured = evaluate_prefixes(Pixels().eval(), batches(images), sides=lambda: (frechet(network), frechet(network)))
    numbers = measured.result.numbers
    psnr = [numbers[f"first {k}/psnr"] for k in (256, 512, 768)]
    assert psnr[1] - psnr[0] == pytest.approx(12.04, abs=0.5)  # 20 log10(4)
    assert psnr[2] - psnr[1] == pytest.approx(12.04, abs=1.0)  # rounding to uint8 shows
    for metric, sign in (("ssim", 1), ("mse", -1), ("fd_classifier", -1)):
        values = [sign * numbers[f"first {k}/{metric}"] for k in (256, 512, 768)]
        assert values == sorted(values)
    assert measured.result.subject["prefixes"]["first 512"] == "to level1"
    assert measured.result.protocol["count"] == 23
    assert Image.open(measured.draw_images(tmp_path / "images.png")).size == (4 * 98 - 2, 8 * 98 - 2)
    assert Image.open(measured.draw_curves(tmp_path / "curves.png")).size[0] > 500


def frechet(network):
    return SampleScore(network, {"frechet": Frechet(network)})


@pytest.mark.parametrize("kind", ["residual", "multiscale", "flexvar"])
def test_all_tokens_are_the_whole_reconstruction(kind):
    tokenizer = tiny(kind)
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    measured = evaluate_prefixes(tokenizer, batches(images, 2))
    whole = evaluate_tokenizer(tokenizer, lambda cuts: ({"image": images[cut]} for cut in cuts), 5, Pace(2))
    last = measured.prefixes[-1]
    assert last.tokens == tokenizer.layout.total_tokens
    for name in ("psnr", "ssim", "mse"):
        assert measured.result.numbers[f"{last.name}/{name}"] == pytest.approx(whole.numbers[name], rel=1e-5)


def test_prefixes_are_whole_scales_and_do_not_see_what_follows():
    tokenizer = tiny("multiscale")
    prefixes = prefixes_of(tokenizer)
    assert [(prefix.tokens, prefix.about) for prefix in prefixes] == [(1, "to scale0"), (5, "to scale1"), (21, "to scale2")]
    for kind, tokens in (("multiscale", 5), ("residual", 32)):
        tokenizer = tiny(kind)
        one = next(prefix for prefix in prefixes_of(tokenizer) if prefix.tokens == tokens)
        codes = torch.randint(16, (2, tokenizer.layout.total_tokens), generator=torch.Generator().manual_seed(1))
        other = codes.clone()
        other[:, tokens:] = 0
        with torch.no_grad():
            assert torch.equal(one.decode(codes), one.decode(other))


@pytest.mark.parametrize("kind", ["vqgan", "gigatok", "titok"])
def test_others_are_refused(kind):
    with pytest.raises(UserError, match=r"cannot decode a prefix of its (raster|sequence) tokens; measure a multi-scale"):
        prefixes_of(tiny(kind))
