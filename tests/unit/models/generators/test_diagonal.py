import pytest
import torch
from tokar.models.attention import Context, rope_table
from tokar.models.generators.diagonal import NAR

VOCAB, CLASSES, ROWS, COLUMNS = 20, 5, 3, 4
TOKENS = ROWS * COLUMNS


def make() -> NAR:
    torch.manual_seed(0)
    generator = NAR(VOCAB, CLASSES, (ROWS, COLUMNS), dim=32, layers=2, heads=2, multiple_of=16)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


@torch.no_grad()
def test_logits_by_definition() -> None:
    """All tokens in raster order under the mask by row + column, then shifted right and down and averaged."""
    generator, codes, condition = make(), torch.randint(VOCAB, (2, TOKENS)), torch.tensor([3, CLASSES])
    places = [(row, column) for row in range(ROWS) for column in range(COLUMNS)]
    distance = torch.tensor([-1, *(row + column for row, column in places)])
    context = Context(rope_table([(-1, -1), *places], 16), mask=distance[:, None] >= distance[None])
    x = torch.cat((generator.classes(condition)[:, None], generator.tokens(codes)), dim=1)
    for layer in range(2):
        x = generator.transformer.blocks[layer](x, context, layer)
    right = generator.head(generator.right_norm(x))
    below = generator.below(generator.transformer.norm(generator.transformer.blocks[2](x, context, 2)))
    expected = torch.empty(2, TOKENS, VOCAB)
    for token, (row, column) in enumerate(places):
        said = [right[:, token]] if column else []  # slot t + 1 holds token t: its left neighbour's slot is `token`
        said += [below[:, token + 1 - COLUMNS]] if row else []
        expected[:, token] = torch.stack(said or [right[:, 0], below[:, 0]]).mean(dim=0)
    torch.testing.assert_close(generator.logits(codes, condition), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["head", "below"])
@torch.no_grad()
def test_first_row_and_first_column_have_one_head(head: str) -> None:
    generator, codes, condition = make(), torch.randint(VOCAB, (1, TOKENS)), torch.tensor([1])
    before = generator.logits(codes, condition)
    torch.nn.init.zeros_(getattr(generator, head).weight)
    same = (generator.logits(codes, condition) == before).all(dim=-1).view(ROWS, COLUMNS)
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    if head == "head":
        expected[1:, 0] = True
    else:
        expected[0, 1:] = True
    assert torch.equal(same, expected)


def test_heads_too_narrow_are_refused() -> None:
    with pytest.raises(ValueError, match="a head is 6 wide; 2-D rotary positions need a multiple of 4"):
        NAR(VOCAB, CLASSES, (2, 2), dim=12, layers=1, heads=2)
