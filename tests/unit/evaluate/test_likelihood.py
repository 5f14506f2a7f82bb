import math

import pytest
import torch
from tokar.errors import UserError
from tokar.evaluate.likelihood import code_likelihood
from tokar.models.generators.base import Generator
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.next_token import NextToken
from tokar.models.tokenizers.layout import Stream, TokenLayout, raster_layout

LAYOUT = raster_layout((2, 2), 8, 1, 4)
PAIR = TokenLayout("raster", (Stream("a", 1, 8, 1), Stream("b", 3, 8, 1)), (8, 8), 4)


def batches(count=10, size=3):
    random = torch.Generator().manual_seed(0)
    codes, label = torch.randint(8, (count, 4), generator=random), torch.randint(2, (count,), generator=random)
    return [{"codes": a, "label": b} for a, b in zip(codes.split(size), label.split(size), strict=True)]


def test_a_generator_that_knows_nothing_pays_for_every_code():
    untrained = NextToken(8, 2, grid=(2, 2), dim=8, layers=1, heads=1, multiple_of=8).eval()  # its head is zero
    seen = []
    numbers = code_likelihood(untrained, LAYOUT, batches(), seen.append)
    assert numbers == pytest.approx({"cross_entropy": math.log(8), "bits_per_token": 3, "bits_per_image": 12})
    assert seen == [3, 3, 3, 1]


class Sure(torch.nn.Module):
    """Probability 1/2 for the code that comes at token 0, 1/4 at the others; depends on the class being told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    exact, text = True, None
    token_nll = Generator.token_nll

    def logits(self, codes, condition):
        assert condition.shape == (len(codes),)
        right = torch.tensor([0.5, 0.25, 0.25, 0.25])[:, None]
        probability = ((1 - right) / 7).expand(4, 8).repeat(len(codes), 1, 1)
        return probability.scatter(2, codes[..., None], right.expand(len(codes), 4, 1)).log()


@pytest.mark.parametrize("size", [1, 4, 10])
def test_streams_are_told_apart(size):
    numbers = code_likelihood(Sure(), PAIR, batches(size=size))
    assert numbers["bits_per_image"] == pytest.approx(7)
    assert numbers["bits_per_token"] == pytest.approx(7 / 4)
    assert numbers["cross_entropy/a"] == pytest.approx(math.log(2))
    assert numbers["cross_entropy/b"] == pytest.approx(math.log(4))


def test_no_codes_is_a_mistake():
    with pytest.raises(UserError, match="no codes"):
        code_likelihood(Sure(), PAIR, [])


def block_diffusion(**changes):
    torch.manual_seed(0)
    generator = BlockDiffusion(8, 2, grid=(2, 2), dim=16, layers=1, heads=2, multiple_of=8, **changes).eval()
    torch.nn.init.normal_(generator.head.weight)
    return generator


def test_a_bound_comes_with_the_error_of_its_draws():
    generator = block_diffusion(block_size=4)
    numbers = [code_likelihood(generator, LAYOUT, batches(40), draws=8, seed=seed) for seed in range(20)]
    bits = torch.tensor([each["bits_per_image"] for each in numbers])
    errors = torch.tensor([each["bits_per_image_error"] for each in numbers])
    assert 0.6 < bits.std() / errors.mean() < 1.5
    assert numbers[0]["bits_per_token_error"] == pytest.approx(errors[0].item() / 4)
    again = code_likelihood(generator, LAYOUT, batches(40, size=7), draws=8, seed=0)
    assert again == pytest.approx(numbers[0], rel=1e-4)


def test_blocks_of_one_have_no_error():
    numbers = code_likelihood(block_diffusion(block_size=1), LAYOUT, batches(), draws=2)
    assert numbers["bits_per_image_error"] == pytest.approx(0, abs=1e-6)
    assert numbers["bits_per_image"] > 0
