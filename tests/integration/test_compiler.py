"""What torch's real compiler makes of a quantizer, of the decode step and of a student's pass: the same as the plain code.

Compiling takes a minute each without a cache; that every other one is a single graph is tested without it.
"""

import copy

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.models.distill.adapt import continuous
from tokar.models.distill.distilled import Ask
from tokar.models.distill.one_step import OneStepGenerator
from tokar.models.distill.token_student import TokenStudent
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import sample
from tokar.models.tokenizers.quantizers import VectorQuantizer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def test_a_quantizer():
    quantizer = VectorQuantizer(20, 4, entropy_weight=0.1, restart_after=2, kmeans_batches=2, rotate=True)
    z = torch.randn(2, quantizer.dim, 12, requires_grad=True)
    quantizer.eval()
    ours, plain = torch.compile(quantizer, fullgraph=True)(z), quantizer(z)
    assert torch.equal(ours.indices, plain.indices)
    torch.testing.assert_close(ours.losses, plain.losses)
    quantizer.train()
    out = torch.compile(quantizer, fullgraph=True)(z)
    (out.latent.sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_a_step_of_decoding():
    generator = NextScale(16, 5, [(1, 1), (2, 2), (4, 4)], 4, dim=32, layers=2, heads=2)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator.bind(tiny("multiscale"))
    generator.eval()
    condition, guidance = torch.tensor([0, 3]), {"kind": "interval", "value": 2.5, "start": 0.2, "stop": 0.7}
    eager, compiled = (sample(generator, condition, seed=0, guidance=guidance, compile=compile) for compile in (False, True))
    assert torch.equal(eager, compiled)
    other = copy.deepcopy(generator)
    torch.nn.init.normal_(other.head.weight, std=0.3)
    drawn = sample(other, condition, seed=0, guidance=guidance, compile=True)
    assert torch.equal(drawn, sample(other, condition, seed=0, guidance=guidance))
    assert not torch.equal(drawn, compiled)


def test_a_students_pass():
    teacher = NextToken(16, 5, grid=(2, 3), dim=32, layers=2, heads=2)
    student = TokenStudent(teacher, 4, (0, 2), 4).eval()
    diffusion = OneStepGenerator(
        continuous(NextToken(16, 5, grid=(2, 3), dim=32, layers=2, heads=2), 4), 4, width=32, depth=1
    ).eval()
    codebook, noise, labels, ids = torch.randn(16, 4), torch.randn(3, 6, 4), torch.tensor([0, 3, 1]), torch.arange(3)
    for network in (student, diffusion):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plain, fast = (network.draw(noise, labels, codebook, Ask(split=4, compile=compile), ids) for compile in (None, True))
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
