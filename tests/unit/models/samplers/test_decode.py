import pytest
import torch
from tokar.errors import UserError
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import _in_chunks, sample
from torch import Tensor

TOKENS, VOCAB, CLASSES = 12, 20, 5
SCHEDULES = [
    1.0,
    2.0,
    {"kind": "step", "value": 3.0, "start": 0.4},
    {"kind": "interval", "value": 3.0, "start": 0.3, "stop": 0.7},
    {"kind": "interval", "value": 3.0, "stop": 0.5},
    "linear:4",
]


@pytest.fixture(scope="module")
def generator() -> NextToken:
    torch.manual_seed(0)
    generator = NextToken(VOCAB, CLASSES, grid=(3, 4), dim=32, layers=2, heads=2, multiple_of=16)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval()


def reference(generator: NextToken, condition: Tensor, scales: list[float]) -> Tensor:
    """Greedy guided codes, by full passes, both halves always."""
    codes = torch.zeros(len(condition), TOKENS, dtype=torch.int64)
    null = torch.full_like(condition, CLASSES)
    for token in range(TOKENS):
        with torch.no_grad():
            c, u = generator.logits(codes, condition)[:, token], generator.logits(codes, null)[:, token]
        codes[:, token] = (u + scales[token] * (c - u)).argmax(-1)
    return codes


@pytest.mark.parametrize(
    ("guidance", "scales"),
    [
        (1.0, [1.0] * 12),
        (2.0, [2.0] * 12),
        (SCHEDULES[2], [1.0] * 5 + [3.0] * 7),
        (SCHEDULES[3], [1.0] * 4 + [3.0] * 5 + [1.0] * 3),
        (SCHEDULES[4], [3.0] * 6 + [1.0] * 6),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_guidance_by_definition(generator: NextToken, guidance: object, scales: list[float], cache: bool) -> None:
    condition = torch.tensor([0, 3, 4])
    codes = sample(generator, condition, seed=0, guidance=guidance, greedy=True, cache=cache)
    assert torch.equal(codes, reference(generator, condition, scales))


@pytest.mark.parametrize("guidance", SCHEDULES)
def test_cached_equals_uncached(generator: NextToken, guidance: object) -> None:
    condition = torch.arange(8) % CLASSES
    choices = {"seed": 1, "guidance": guidance, "temperature": 0.9, "top_k": 15, "top_p": 0.95}
    assert torch.equal(sample(generator, condition, **choices), sample(generator, condition, cache=False, **choices))


@pytest.mark.parametrize("guidance", [1.0, SCHEDULES[3]])
def test_a_sample_is_the_same_in_any_batch(generator: NextToken, guidance: object) -> None:
    condition, ids = torch.arange(7) % CLASSES, torch.arange(7) * 11
    whole = sample(generator, condition, seed=5, sample_ids=ids, guidance=guidance)
    for size in (1, 3, 7, 100):
        assert torch.equal(sample(generator, condition, seed=5, sample_ids=ids, guidance=guidance, max_batch=size), whole)
    order = torch.tensor([6, 2, 0])
    assert torch.equal(sample(generator, condition[order], seed=5, sample_ids=ids[order], guidance=guidance), whole[order])
    assert not torch.equal(sample(generator, condition, seed=6, sample_ids=ids, guidance=guidance), whole)


class Counting(NextToken):
    """Counts the rows of every pass."""

    def begin(self, condition: Tensor, **options: object) -> object:
        self.rows: list[int] = []
        self.joined: list[int] = []
        return super().begin(condition, **options)

    def propose(self, state: object, unit: int) -> Tensor:
        self.rows.append(len(state.condition))
        return super().propose(state, unit)

    def join(self, state: object, condition: Tensor, codes: Tensor, unit: int) -> None:
        self.joined.append(unit)
        super().join(state, condition, codes, unit)


def test_the_unconditional_half_is_computed_only_where_wanted() -> None:
    generator = Counting(VOCAB, CLASSES, grid=(3, 4), dim=16, layers=1, heads=1)
    sample(generator, torch.tensor([0, 1]), seed=0, guidance=SCHEDULES[3])
    assert generator.rows == [2] * 4 + [4] * 5 + [2] * 3
    assert generator.joined == [4]
    sample(generator, torch.tensor([0, 1]), seed=0, guidance=2.0)
    assert generator.rows == [4] * 12
    assert generator.joined == []
    sample(generator, torch.tensor([0, 1]), seed=0)
    assert generator.rows == [2] * 12


def test_given_codes_stay(generator: NextToken) -> None:
    given = torch.full((2, TOKENS), -1)
    given[:, :4] = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    given[1, 9] = 19
    free = sample(generator, torch.tensor([0, 1]), seed=0)
    codes = sample(generator, torch.tensor([0, 1]), seed=0, given=given)
    assert torch.equal(codes[given >= 0], given[given >= 0])
    assert not torch.equal(codes[:, 4:], free[:, 4:])
    assert torch.equal(sample(generator, torch.tensor([0, 1]), seed=0, given=free), free)


def test_progress_and_mode(generator: NextToken) -> None:
    seen: list[tuple[int, int]] = []
    generator.train()
    drawn = sample(
        generator, torch.tensor([0, 1, 2]), seed=0, max_batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert generator.training
    generator.eval()
    assert torch.equal(drawn, sample(generator, torch.tensor([0, 1, 2]), seed=0))
    assert seen == [(2 * i, 36) for i in range(1, 13)] + [(24 + i, 36) for i in range(1, 13)]


def test_half_precision(generator: NextToken) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        codes = sample(generator, torch.tensor([0, 1]), seed=0, guidance=SCHEDULES[3])
    assert codes.shape == (2, TOKENS)


def test_no_samples(generator: NextToken) -> None:
    assert sample(generator, torch.zeros(0, dtype=torch.int64), seed=0).shape == (0, TOKENS)


def test_chunks_shrink_until_they_fit() -> None:
    tried: list[tuple[int, int]] = []

    def run(rows: slice) -> Tensor:
        tried.append((rows.start, rows.stop))
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("no memory")
        return torch.arange(rows.start, rows.stop)

    assert torch.cat(_in_chunks(7, 12, run)).tolist() == list(range(7))
    assert tried == [(0, 7), (0, 6), (0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature: must be positive; use greedy"),
        ({"temperature": "linear:-1"}, "temperature: must be positive"),
        ({"top_k": -1}, "top_k: -1 is negative"),
        ({"top_p": 0.0}, r"top_p: 0.0 is not in \(0, 1\]"),
        ({"guidance": "stp:2"}, "did you mean 'step'"),
        ({"condition": torch.tensor([6])}, "condition: class ids 6 … 6"),
        ({"condition": torch.tensor([-1])}, "condition: class ids -1"),
        ({"seed": -1}, "negative"),
        ({"sample_ids": torch.tensor([1, 2])}, "2 ids for 1 samples"),
        ({"given": torch.zeros(1, 3, dtype=torch.int64)}, r"given: shape \(1, 3\)"),
        ({"given": torch.full((1, TOKENS), 20)}, "given: code 20"),
        ({"max_batch": 0}, "max_batch: 0"),
    ],
)
def test_mistakes_get_one_line(generator: NextToken, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(generator, **{"condition": torch.tensor([1]), "seed": 0, **change})


def test_diverged_weights_are_reported(generator: NextToken) -> None:
    broken = NextToken(VOCAB, CLASSES, grid=(3, 4), dim=16, layers=1, heads=1)
    torch.nn.init.constant_(broken.transformer.norm.weight, torch.nan)
    with pytest.raises(UserError, match="not a number"):
        sample(broken, torch.tensor([0]), seed=0)
