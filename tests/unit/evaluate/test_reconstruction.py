import math

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.frechet import GaussianStatistics, frechet_distance
from tokar.evaluate.measures import Frechet
from tokar.evaluate.ranks import Pace
from tokar.evaluate.reconstruction import CodebookUsage, ReconstructionScore, evaluate_tokenizer, psnr, ssim
from tokar.evaluate.score import SampleScore
from tokar.models.tokenizers.base import Tokenizer, TokenizerOutput
from tokar.models.tokenizers.layout import Stream, TokenLayout, raster_layout
from torch import nn


class Levels(Tokenizer):
    """A code is the grey level of a 4x4 patch, in 16 steps."""

    def __init__(self):
        super().__init__()
        self.layout = raster_layout((4, 4), 16, 1, 4)
        self.scale = nn.Linear(1, 1)

    def encode(self, image):
        assert not self.training
        grey = nn.functional.avg_pool2d(image.mean(1, keepdim=True), 4)
        codes = ((grey + 1) * 8).long().clamp(0, 15).flatten(1)
        return TokenizerOutput(codes, grey, grey)

    def embed(self, codes):
        return (codes.float() + 0.5) / 8 - 1

    def decode(self, latent):
        return self.embed(latent).view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1) * 1.2

    def last_layer(self):
        return self.scale


def pair(size=16, count=5):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    b = (a + torch.randint(-30, 31, a.shape, generator=generator)).clamp(0, 255)
    return a.to(torch.uint8), b.to(torch.uint8)


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = pair()
    expected = [peak_signal_noise_ratio(y[None].float(), x[None].float(), data_range=255.0) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(psnr(a, b), torch.stack(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [11, 16, 33])
def test_ssim_agrees_with_torchmetrics(size):
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = pair(size)
    _, whole = structural_similarity_index_measure(b.double(), a.double(), data_range=255.0, return_full_image=True)
    expected = whole[..., 5:-5, 5:-5].mean((1, 2, 3))  # it pads by reflection; the windows inside are the paper's
    torch.testing.assert_close(ssim(a, b), expected, rtol=1e-5, atol=1e-6)


def test_equal_images_are_capped_and_one():
    a, _ = pair()
    assert psnr(a, a).tolist() == [100.0] * 5
    torch.testing.assert_close(ssim(a, a), torch.ones(5).double())


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(UserError, match="needs images of 11 pixels"):
        ssim(*pair(8))


def test_usage_and_perplexity():
    usage = CodebookUsage(raster_layout((2, 2), 8, 1, 4))
    usage.update(torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]))
    assert usage.numbers() == pytest.approx({"codebook_usage": 0.5, "codebook_perplexity": 4.0})
    usage.update(torch.tensor([[0, 0, 0, 0]]))
    p = [6 / 12, 2 / 12, 2 / 12, 2 / 12]
    assert usage.numbers()["codebook_perplexity"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_scales_are_counted_apart_and_together():
    streams = (Stream("scale0", 1, 4, 1, (1, 1), 0), Stream("scale1", 4, 4, 1, (2, 2), 1))
    usage = CodebookUsage(TokenLayout("multiscale", streams, (8, 8), 4))
    usage.update(torch.tensor([[3, 0, 0, 1, 1]]))
    numbers = usage.numbers()
    assert numbers["codebook_usage"] == 0.75
    assert (numbers["codebook/scale0_usage"], numbers["codebook/scale1_usage"]) == (0.25, 0.5)
    assert numbers["codebook/scale1_perplexity"] == pytest.approx(2)


def frechet_sides(network):
    """Measures of both sides, as a protocol makes them."""
    return network and (lambda: tuple(SampleScore(network, {"frechet": Frechet(network)}) for _ in range(2)))


def evaluated(tokenizer, images, size, network=None, on_batch=lambda count: None, **more):
    source, pace = source_of(images), Pace(size, on_batch=on_batch)
    return evaluate_tokenizer(tokenizer, source, len(images), pace, sides=frechet_sides(network), **more)


def source_of(images):
    def source(batches):
        for numbers in batches:
            yield {"image": images[numbers], "label": torch.zeros(len(numbers), dtype=torch.int64)}

    return source


def test_a_tokenizer_is_measured_on_what_a_file_would_hold(network, images):
    tokenizer = Levels().train()
    seen = []
    result = evaluated(tokenizer, images, 5, network, seen.append, data={"name": "noise"})
    tokenizer.eval()
    written = tokenizer.decode(tokenizer.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).codes)
    written = torch.floor((written + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    original = images.permute(0, 3, 1, 2)
    assert result.numbers["psnr"] == pytest.approx(psnr(original, written).mean().item())
    assert result.numbers["ssim"] == pytest.approx(ssim(original, written).mean().item())
    assert result.numbers["mse"] == pytest.approx((original.double() - written.double()).square().mean().item())
    both = [GaussianStatistics(network.dim) for _ in range(2)]
    both[0].update(network(images).pooled)
    both[1].update(network(written.permute(0, 2, 3, 1)).pooled)
    expected = frechet_distance(both[0].gaussian(), both[1].gaussian())
    assert result.numbers["fd_classifier"] == pytest.approx(expected, rel=1e-6)
    assert result.protocol["count"] == sum(seen) == 23
    assert result.protocol["features"] == network.protocol()
    assert result.protocol["data"] == {"name": "noise"}
    assert result.protocol["reference"] == "the same images, uint8"  # so rFID is validation against validation
    assert result.protocol["reconstruction"] == "uint8, clamp(round_half_up((x + 1) * 127.5), 0, 255)"


def test_the_mode_is_put_back(images):
    tokenizer = Levels().train()
    evaluated(tokenizer, images, 23)
    assert tokenizer.training


def test_batch_size_does_not_matter(network, images):
    results = [evaluated(Levels(), images, size, network) for size in (1, 4, 23)]
    for other in results[1:]:
        assert other.numbers == pytest.approx(results[0].numbers, rel=1e-6)
        assert other.protocol_id == results[0].protocol_id


def test_rounding_is_another_protocol(images):
    rounded, plain = (evaluated(Levels(), images, 8, rounded=value) for value in (True, False))
    assert rounded.numbers["psnr"] != plain.numbers["psnr"]
    assert rounded.protocol_id != plain.protocol_id


def test_a_perceptual_distance_sees_images_in_range(images):
    def distance(a, b):
        assert a.shape == b.shape == (len(a), 3, 16, 16)
        assert b.abs().max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    result = evaluated(Levels(), images, 8, perceptual=distance)
    assert 0 < result.numbers["lpips"] < 1
    assert "lpips" in result.protocol


def test_parts_change_nothing(network, images):
    tokenizer = Levels().eval()

    def score(*parts):
        total = ReconstructionScore(tokenizer.layout, frechet_sides(network))
        for part in parts:
            codes = tokenizer.encode(part.permute(0, 3, 1, 2) / 127.5 - 1).codes
            total.update({"image": part}, tokenizer.decode(codes), codes)
        return total

    total = ReconstructionScore(tokenizer.layout, frechet_sides(network))
    for rank in range(3):
        total.merge(score(images[rank::3][:4], images[rank::3][4:]).state_dict())
    assert total.numbers() == pytest.approx(score(images).numbers(), rel=1e-6)


def test_no_images_is_a_mistake():
    with pytest.raises(UserError, match="no images to measure"):
        evaluated(Levels(), torch.zeros(0, 16, 16, 3, dtype=torch.uint8), 8)
