"""Trajectories of real teachers: restart, guidance baked in, cost. An integration test measures their distribution."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.errors import UserError
from tokar.models.distill.codebook import codebook_of, decode_vectors, nearest
from tokar.models.distill.flow_map import TokenMap
from tokar.models.distill.trajectory import check_teacher, distributions, follow
from tokar.models.generators.block_diffusion import BlockDiffusion
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken
from tokar.models.samplers.decode import Tally, choices_for, sample
from torch.nn import functional as F
from toy_teacher import normal


def next_token(**more):
    torch.manual_seed(0)
    model = NextToken(16, 3, grid=(2, 3), dim=32, layers=2, heads=2, token_dropout=0, resid_dropout=0, ffn_dropout=0, **more)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def next_scale():
    tokenizer = tiny("multiscale")
    torch.manual_seed(0)
    model = NextScale(16, 3, [[1, 1], [2, 2], [4, 4]], 4, dim=32, layers=2, heads=2, gate_init=0.5).eval()
    model.bind(tokenizer)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model, codebook_of(tokenizer)


@pytest.mark.parametrize("kind", ["token", "scale"])
def test_a_trajectory_goes_on_from_its_middle(kind):
    """T6, to the last code; guidance and truncation are part of the map, and the given units cost nothing."""
    model, codebook = (next_token(), torch.randn(16, 4)) if kind == "token" else next_scale()
    labels, noise = torch.tensor([0, 1, 2, 0]), normal(3, 4, model.plan.n_tokens, 4)
    choices = {"guidance": 2.0, "top_k": 9}
    tally = Tally()
    whole = follow(model, labels, noise, TokenMap(codebook, steps=20), tally=tally, **choices)
    assert (tally.calls, tally.evaluations) == (model.plan.n_units, 2 * model.plan.n_units)
    assert not torch.equal(whole, follow(model, labels, noise, TokenMap(codebook, steps=20), top_k=9))
    for units in range(1, model.plan.n_units + 1):
        given, tally = whole.clone(), Tally()
        given[:, model.plan.committed[units] :] = -1
        again = follow(model, labels, noise, TokenMap(codebook, steps=20), given=given, tally=tally, **choices)
        assert torch.equal(again, whole)
        assert tally.calls == model.plan.n_units - units
    uncached = follow(model, labels, noise, TokenMap(codebook, steps=20), cache=False, given=given, **choices)
    assert torch.equal(uncached, whole)
    assert torch.equal(whole[:2], follow(model, labels, noise, TokenMap(codebook, steps=20), max_batch=2, **choices)[:2])
    allowed = distributions(model, whole, labels, choices_for(model, **choices))
    assert (allowed.gather(2, whole[..., None]) > -torch.inf).all()
    assert ((allowed > -torch.inf).sum(-1) == 9).all()


def test_a_prefix_that_is_given_changes_no_draw():
    """Fed along with the first unit that is drawn, with and without guidance, also where guidance begins later."""
    model = next_token()
    labels = torch.tensor([0, 1, 2])
    for guidance in (1.0, 2.0, "step:2.0,start=0.6"):
        whole = sample(model, labels, seed=0, guidance=guidance)
        given = whole.clone()
        given[:, 2:] = -1
        tally = Tally()
        assert torch.equal(sample(model, labels, seed=0, guidance=guidance, given=given, tally=tally), whole)
        assert tally.calls in (4, 5)  # the half that joins later has a pass of its own
        short = sample(model, labels, seed=0, guidance=guidance, until=4)
        assert torch.equal(short[:, :4], whole[:, :4])
        assert not short[:, 4:].any()


def test_distributions_follow_the_schedule():
    model, labels = next_token(), torch.tensor([0, 1])
    codes = torch.randint(16, (2, 6))
    found = distributions(model, codes, labels, choices_for(model, guidance="step:3.0,start=0.5", temperature=2.0))
    plain, null = model.logits(codes, labels), model.logits(codes, torch.full_like(labels, 3))
    assert torch.allclose(found[:, :3], plain[:, :3] / 2, atol=1e-6)
    assert torch.allclose(found[:, 3:], (null + 3 * (plain - null))[:, 3:] / 2, atol=1e-5)


def test_blocks_are_no_function_of_noise():
    model = BlockDiffusion(8, 2, n_tokens=4, block="chunks", block_size=2, dim=16, layers=1, heads=2)
    with pytest.raises(UserError, match="reveals a block in several steps"):
        check_teacher(model)


@pytest.mark.parametrize("kind", ["vqgan", "multiscale", "flexvar", "gigatok", "titok"])
def test_codes_as_vectors_decode_as_codes(kind):
    tokenizer = tiny(kind)
    codebook = codebook_of(tokenizer)
    assert codebook.shape == (16, 4)
    codes = torch.randint(16, (2, tokenizer.layout.total_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = tokenizer.decode(codes), decode_vectors(tokenizer, F.embedding(codes, codebook))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(codebook[nearest(F.embedding(codes, codebook), codebook)], codebook[codes])


def test_several_codes_to_a_position_have_no_codebook():
    with pytest.raises(UserError, match="do not share one codebook"):
        codebook_of(tiny("residual"))
