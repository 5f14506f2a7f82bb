import pytest
import torch
from tokar.models.generators.permuted import RAR
from torch._dynamo.testing import CompileCounter

VOCAB, CLASSES, GRID, TOKENS = 20, 5, (3, 4), 12


def make(**changes: object) -> RAR:
    torch.manual_seed(0)
    generator = RAR(VOCAB, CLASSES, **{"grid": GRID, "dim": 32, "layers": 2, "heads": 2, "dropout": 0.0, **changes})
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return generator


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 1.0), (0.55, 0.8), (0.625, 0.5), (0.75, 0.0), (1.0, 0.0)])
def test_the_share_of_random_orders_falls(progress: float, share: float) -> None:
    """Every order is random up to half of the run, none from three quarters on (arXiv:2411.00776, section 3.2)."""
    generator = make()
    generator.anneal(progress)
    noise = torch.rand(4000, 1 + TOKENS, generator=torch.Generator().manual_seed(0))
    orders = generator._orders(noise)
    assert (orders.sort(dim=1).values == torch.arange(TOKENS)).all()
    random = (orders != torch.arange(TOKENS)).any(dim=1)
    assert torch.equal(random, noise[:, 0] < share)
    places = orders[random].float()
    if share:  # every token is as likely at every place
        assert (places.mean(dim=0) - (TOKENS - 1) / 2).abs().max() < 0.6


def test_an_end_at_the_start_is_a_step() -> None:
    generator = make(anneal_start=0.5, anneal_end=0.5)
    shares = []
    for progress in (0.49, 0.5):
        generator.anneal(progress)
        shares.append(generator._randomness.item())
    assert shares == [1.0, 0.0]


@torch.no_grad()
def test_training_ends_in_raster_order() -> None:
    """What is evaluated and sampled is the model as it is trained in the end; a random order gives another loss."""
    generator, codes, condition = make(attention_dropout=0.0), torch.randint(VOCAB, (4, TOKENS)), torch.arange(4)
    noise = torch.rand(4, 1 + TOKENS)
    generator.train()
    random = generator(codes, condition, noise)["loss"]
    generator.anneal(1.0)
    raster = generator(codes, condition, noise)["loss"]
    held_out = generator.eval()(codes, condition, noise)["loss"]
    torch.testing.assert_close(raster, held_out)
    assert (random - raster).abs() > 1e-3


def test_orders_are_each_samples_own() -> None:
    """A sample's order follows from its own numbers, not from the batch; without numbers they are drawn."""
    generator, noise = make(), torch.rand(6, 1 + TOKENS)
    assert torch.equal(generator._orders(noise)[2:4], generator._orders(noise[2:4]))
    codes, condition = torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1])
    generator.train()
    losses = {generator(codes, condition)["loss"].item() for _ in range(3)}
    assert len(losses) == 3


def test_annealing_compiles_once() -> None:
    """The probability moves at every step of a run; a number would be a constant of the compiled step."""
    generator, counter = make(), CompileCounter()
    compiled = torch.compile(generator.train(), backend=counter)
    codes, condition, noise = torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1]), torch.rand(2, 1 + TOKENS)
    seen = set()
    for progress in (0.0, 0.6, 0.7):
        generator.anneal(progress)
        compiled(codes, condition, noise)
        seen.add(counter.frame_count)
    assert len(seen) == 1
    torch._dynamo.reset()


def test_dropout_of_attention_only_while_training() -> None:
    generator, codes, condition = make(attention_dropout=0.5), torch.randint(VOCAB, (2, TOKENS)), torch.tensor([0, 1])
    generator.anneal(1.0)
    generator.eval()
    assert torch.equal(generator.logits(codes, condition), generator.logits(codes, condition))
    generator.train()
    assert not torch.equal(generator.logits(codes, condition), generator.logits(codes, condition))


def test_modulation_begins_as_none() -> None:
    """Every block adds nothing at first, so all logits of a fresh model follow from one slot's input alone."""
    torch.manual_seed(0)
    generator = RAR(VOCAB, CLASSES, grid=GRID, dim=32, layers=2, heads=2).eval()
    codes = torch.randint(VOCAB, (1, TOKENS))
    changed = codes.clone()
    changed[0, 4] = (codes[0, 4] + 1) % VOCAB
    before, after = (generator.logits(each, torch.tensor([1])) for each in (codes, changed))
    assert (before != after).any(dim=-1).flatten().nonzero().flatten().tolist() == [5]


def test_what_is_not_decayed() -> None:
    """Embeddings, positions, steps and the last modulation, as in the published trainer."""
    names = [name for name, parameter in make().named_parameters() if parameter.ndim >= 2 and name.endswith(RAR.undecayed)]
    assert names == ["positions", "targets", "steps", "transformer.final.weight", "tokens.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal_start": 0.8}, "anneal_end 0.75 lies before anneal_start 0.8; swap them"),
        ({"n_tokens": 12}, "exactly one of grid"),
        ({"heads": 3}, "3 heads do not divide the width 32"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
