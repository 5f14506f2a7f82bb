"""What holds for every quantizer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokar.errors import UserError
from tokar.models.build import load_strict
from tokar.models.tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    ClusteringVectorQuantizer,
    EMAVectorQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

MAKE = {
    "vq": lambda: VectorQuantizer(20, 4, entropy_weight=0.1, restart_after=2, kmeans_batches=2, rotate=True),
    "vq_euclidean": lambda: VectorQuantizer(20, 4, l2_normalize=False, entropy_weight=0.1),
    "vq_ema": lambda: EMAVectorQuantizer(20, 4, l2_normalize=False, entropy_weight=0.1, restart_after=2, kmeans_batches=1),
    "vq_ema_unit": lambda: EMAVectorQuantizer(20, 4, rotate=True),
    "vq_clustering": lambda: ClusteringVectorQuantizer(20, 4, entropy_weight=0.1),
    "simvq": lambda: SimVQ(20, 4, entropy_weight=0.1, rotate=True),
    "ibq": lambda: IBQ(20, 4),
    "fsq": lambda: FSQ([3, 4, 5]),
    "lfq": lambda: LFQ(5, group_bits=2),
    "bsq": lambda: BSQ(5),
    "residual": lambda: ResidualQuantizer({"a": LFQ(4), "b": LFQ(4), "c": VectorQuantizer(9, 4, restart_after=1)}, shrink=0.5),
    "product": lambda: ProductQuantizer({"left": FSQ([5, 5]), "right": VectorQuantizer(7, 3, kmeans_batches=1)}),
    "nested": lambda: ProductQuantizer(
        {"left": ResidualQuantizer({"x": EMAVectorQuantizer(7, 3), "y": IBQ(5, 3)}), "right": BSQ(3)}
    ),
}
LEARNED = ("vq", "vq_euclidean", "vq_clustering", "simvq", "ibq", "residual", "product", "nested")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=MAKE)
def quantizer(request):
    return MAKE[request.param]()


def step(quantizer, *shape):
    z = torch.randn(2, quantizer.dim, *shape, requires_grad=True)
    return z, quantizer(z)


def train(quantizer, steps):
    optimizer = torch.optim.SGD(
        [{"params": list(quantizer.parameters())}, {"params": [torch.nn.Parameter(torch.zeros(1))]}], 0.1
    )
    for _ in range(steps):
        _, out = step(quantizer, 6)
        optimizer.zero_grad()
        (out.latent.square().mean() + sum(out.losses.values())).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_types_and_the_way_back(quantizer, shape, training):
    z, (latent, indices, losses) = step(quantizer.train(training), *shape)
    streams = quantizer.streams
    assert latent.shape == z.shape
    assert latent.dtype == torch.float32
    assert indices.shape == ((2, *shape) if len(streams) == 1 else (2, len(streams), *shape))
    assert indices.dtype == torch.int64
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert sum(stream.dim for stream in streams) >= quantizer.dim
    assert quantizer.codebook_size == max(stream.codebook_size for stream in streams)
    if not training:
        again = quantizer.embed(indices)
        assert torch.equal(again, latent), "the codes alone give back the very same latent"
        assert again.stride() == latent.stride(), "and what follows adds up in the same order"


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("residual", "ibq", "nested")])
def test_codes_of_codes_are_the_codes(name):
    """Every code is its own best code. Not so for greedy residuals, nor for inner products with codes of unequal length."""
    quantizer = MAKE[name]().eval()

    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 2**31))
    def check(seed):
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randint(stream.codebook_size, (2, 3, 4), generator=generator) for stream in quantizer.streams]
        indices = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
        codes = quantizer.embed(indices)
        again = quantizer(scaled(quantizer, codes))
        assert torch.equal(again.indices, indices)
        assert torch.equal(again.latent, codes)

    check()


def scaled(quantizer, codes):
    """FSQ sees its input through tanh: what it must see to give a code back."""
    first = quantizer.parts["left"] if isinstance(quantizer, ProductQuantizer) else quantizer
    if not isinstance(first, FSQ):
        return codes
    levels = torch.tensor(first.levels)[:, None, None]
    reach, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
    head = torch.atanh((codes[:, : first.dim] * (levels // 2) + offset) / reach) - torch.atanh(offset / reach)
    return torch.cat([head, codes[:, first.dim :]], dim=1)


def test_indices_that_are_no_codes_are_refused(quantizer):
    _, out = step(quantizer, 5)
    for wrong in (-1, quantizer.codebook_size):
        indices = out.indices.clone()
        indices[0] = wrong
        with pytest.raises(UserError, match=rf"code {wrong} is not one of the \d+ of this codebook.*tokenizer that made them"):
            quantizer.embed(indices)


def test_gradients_reach_the_latent_and_every_parameter(quantizer):
    z, out = step(quantizer, 9)
    (out.latent.sum() + sum(out.losses.values())).backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


def test_autocast_changes_nothing(quantizer):
    quantizer.eval()
    z = torch.randn(2, quantizer.dim, 11)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
        embedded = quantizer.embed(inside.indices)
    outside = quantizer(z)
    assert torch.equal(inside.latent, outside.latent)
    assert torch.equal(embedded, outside.latent)
    assert inside.losses.keys() == outside.losses.keys()
    assert all(torch.equal(value, outside.losses[name]) for name, value in inside.losses.items())


def test_evaluation_leaves_all_state_and_randomness_alone(quantizer):
    train(quantizer, 1)
    before, rng = copy.deepcopy(quantizer.eval().state_dict()), torch.get_rng_state()
    quantizer(torch.ones(2, quantizer.dim, 3))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("before", [1, 4])
def test_resumes_bitwise(name, before):
    quantizer = MAKE[name]()
    train(quantizer, before)
    state, rng = copy.deepcopy(quantizer.state_dict()), torch.get_rng_state()
    train(quantizer, 4)
    resumed = MAKE[name]()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    train(resumed, 4)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
def test_a_model_made_on_the_meta_device_is_whole_once_its_weights_are_there(name):
    quantizer = MAKE[name]().eval()
    with torch.device("meta"):
        empty = MAKE[name]().eval()
    load_strict(empty, quantizer.state_dict(), where="test")
    z = torch.randn(2, quantizer.dim, 5)
    assert torch.equal(empty(z).latent, quantizer(z).latent)
    assert torch.equal(empty.embed(quantizer(z).indices), quantizer(z).latent)


@pytest.mark.slow
def test_compiles_to_one_graph(quantizer):
    """Training steps with all they do to the codebook; the state must come out as it does without a compiler."""
    plain = copy.deepcopy(quantizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        z = torch.randn(2, quantizer.dim, 12, requires_grad=True)
        state = torch.get_rng_state()
        ours = compiled(z)
        torch.set_rng_state(state)
        theirs = plain(z)
        assert torch.equal(ours.indices, theirs.indices)
        torch.testing.assert_close(ours.losses, theirs.losses)
        torch.testing.assert_close(ours.latent, theirs.latent)
        (grad,) = torch.autograd.grad(ours.latent.sum(), z)
        assert grad.isfinite().all()
    torch.testing.assert_close(quantizer.state_dict(), plain.state_dict())
    embed = torch.compile(quantizer.embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(embed(ours.indices), quantizer.embed(ours.indices))


@pytest.mark.parametrize("name", LEARNED)
def test_training_moves_what_is_learned(name):
    quantizer = MAKE[name]()
    before = [parameter.detach().clone() for parameter in quantizer.parameters()]
    train(quantizer, 1)
    assert before
    assert all(not torch.equal(old, new) for old, new in zip(before, quantizer.parameters(), strict=True))
