"""The step of fixed shapes can be compiled where units differ in size, and draws what the others draw."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.models.generators import block_steps, planned
from tokar.models.generators.base import Generator
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.diagonal import NAR
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.static_step import static_step
from tokar.models.samplers.decode import sample

VOCAB, CLASSES, GRIDS = 16, 5, [(1, 1), (2, 2), (4, 4)]
SIZES = {"dim": 32, "layers": 2, "heads": 2}
MAKE = {
    "diagonals": lambda: NAR(VOCAB, CLASSES, (3, 3), multiple_of=16, **SIZES),
    "scales": lambda: NextScale(VOCAB, CLASSES, GRIDS, 4, **SIZES),
    "blocks": lambda: BlockDiffusion(VOCAB, CLASSES, (4, 4), multiple_of=16, shift=True, **SIZES),
}


def make(kind: str) -> Generator:
    torch.manual_seed(0)
    generator = MAKE[kind]()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if generator.needs_tokenizer:
        generator.bind(tiny("multiscale"))
    return generator.eval()


def drawn(generator: Generator, compile: bool) -> torch.Tensor:
    within = {"steps": 2} if isinstance(generator, BlockDiffusion) else {}
    guidance = {"kind": "interval", "value": 2.5, "start": 0.2, "stop": 0.7}
    return sample(generator, torch.tensor([0, 3]), seed=0, guidance=guidance, compile=compile, **within)


@pytest.mark.parametrize("kind", MAKE)
def test_traced_as_one_graph_it_draws_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph break would be an error; the unconditional half comes and goes."""
    torch._dynamo.reset()
    traced = torch.compile(static_step, backend="eager", fullgraph=True)
    steps = []
    for module in (planned, block_steps):
        monkeypatch.setattr(module, "compiled_step", lambda: lambda *given: steps.append(0) or traced(*given))
    generator = make(kind)
    assert torch.equal(drawn(generator, True), drawn(generator, False))
    assert len(steps) >= generator.plan.n_units - 1
