import pytest
import torch
from tokar.models.generators.next_token import NextToken
from tokar.models.generators.parallel import PAR

VOCAB, CLASSES, GRID = 20, 5, (4, 6)


def make(grid: tuple[int, int] = GRID, regions: tuple[int, int] = (2, 2)) -> PAR:
    torch.manual_seed(0)
    generator = PAR(VOCAB, CLASSES, grid, regions, dim=32, layers=2, heads=2, multiple_of=16)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


@torch.no_grad()
def test_fillers_help_from_the_first_parallel_step_on() -> None:
    generator, codes, condition = make(), torch.randint(VOCAB, (1, 24)), torch.tensor([1])
    assert generator.fillers.weight.shape[0] == 3
    before = generator.logits(codes, condition)[0]
    for filler in range(3):
        generator.fillers.weight[filler] += 1
        moved = (generator.logits(codes, condition)[0] != before).any(dim=-1)
        generator.fillers.weight[filler] -= 1
        single = [0, 3, 12, 15]
        assert moved.nonzero().flatten().tolist() == [token for token in range(24) if token not in single]


@torch.no_grad()
def test_one_region_is_next_token() -> None:
    """All that is left of it is LlamaGen: the same weights give the same logits."""
    generator, codes, condition = make(regions=(1, 1)), torch.randint(VOCAB, (2, 24)), torch.tensor([0, CLASSES])
    twin = NextToken(VOCAB, CLASSES, grid=GRID, dim=32, layers=2, heads=2, multiple_of=16).eval()
    twin.load_state_dict(generator.state_dict())
    assert generator.fillers is None
    torch.testing.assert_close(generator.logits(codes, condition), twin.logits(codes, condition), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("regions", "heads", "message"),
    [((3, 2), 2, "3x2 regions do not divide a grid of 4x6"), ((2, 2), 16, "a head is 2 wide; 2-D rotary")],
)
def test_arguments_that_cannot_work(regions: tuple[int, int], heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PAR(VOCAB, CLASSES, GRID, regions, dim=32, layers=1, heads=heads)
