"""Both stages of DD2 with a next-scale teacher: what a step trains, what the head-only phase leaves alone, who is refused."""

import pytest
import torch
from tiny_tokenizers import tiny
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.build import build, save_model, weights_hash
from tokar.models.distill.codebook import codebook_of
from tokar.models.distill.one_step import OneStepGenerator
from tokar.models.open import OpenedGenerator
from tokar.train.cost import LATE, _OnPaper
from tokar.train.dd2 import DD2Stage, DiffusionStage

NODE = {
    "_target_": "tokar.models.generators.next_scale.NextScale", "vocab_size": 16, "num_classes": 3,
    "grids": [[1, 1], [2, 2], [4, 4]], "embed_dim": 4, "dim": 32, "layers": 2, "heads": 2,
}  # fmt: skip


def teacher(seed):
    tokenizer = tiny("multiscale")
    torch.manual_seed(seed)
    generator = build(NODE)
    generator.bind(tokenizer)
    return OpenedGenerator(generator.eval(), tokenizer, {"tokenizer": {"hash": weights_hash(tokenizer)}}, NODE)


def batch():
    torch.manual_seed(1)
    ids = torch.arange(3)
    return {"noise": torch.randn(3, 21, 4), "codes": torch.randint(16, (3, 21)), "label": ids, "index": ids, "epoch": 0 * ids}


def step(stage):
    return stage.step(batch(), LATE, {name: _OnPaper(item, None) for name, item in stage.trainables.items()})


def with_gradient(module):
    return {name.partition(".")[0] for name, value in module.named_parameters() if value.grad is not None}


def test_a_step_of_each_stage(tmp_path):
    opened = teacher(0)
    for head_only in (True, False):
        words = ["experiment=diffusion_var_d16", "width=16", "draws=2", "sampling.top_k=9", f"head_only={head_only}"]
        diffusion = DiffusionStage(compose("diffusion", words).typed, opened)
        assert step(diffusion)["loss"] > 0
        assert with_gradient(diffusion.model) == {"velocity_head"} | (set() if head_only else {"backbone"})
    main = diffusion.trainables["model"]
    save_model(tmp_path / "diffusion", main.node, main.module.state_dict(), main.facts)
    words = ["experiment=dd2_var_d16", "draws=2", f"diffusion={tmp_path / 'diffusion'}", "sampling.top_k=9", "fake_updates=1"]
    stage = DD2Stage(compose("dd2", words).typed, opened)
    assert {"loss", "generator_loss", "code_distance"} == set(step(stage))
    for network in (stage.generator, stage.fake):
        assert all(value.grad is not None for value in network.parameters())
    with pytest.raises(UserError, match="was made from another teacher"):
        DD2Stage(compose("dd2", words).typed, teacher(1))
    main = stage.trainables["generator"]
    assert main.node["_target_"].endswith("OneStepGenerator")
    assert isinstance(build(main.node), OneStepGenerator)


def test_pairs_beside_scores_or_alone(tmp_path):
    """Gradients of both losses add up; alone, regression moves the generator at every step and the other network never."""
    opened, found = teacher(0), {}
    diffusion = DiffusionStage(compose("diffusion", ["experiment=diffusion_var_d16", "width=16"]).typed, opened)
    main = diffusion.trainables["model"]
    save_model(tmp_path / "diffusion", main.node, main.module.state_dict(), main.facts)
    words = ["experiment=dd2_var_d16", "draws=2", f"diffusion={tmp_path / 'diffusion'}", "sampling.top_k=9", "fake_updates=1"]
    for name, more in {
        "scores": [],
        "both": ["pair_weight=0.5"],
        "pairs": ["pair_weight=1", "score_weight=0", "fake_updates=7"],
    }.items():
        stage = DD2Stage(compose("dd2", [*words, *more]).typed, opened)
        metrics = step(stage)
        found[name] = [value.grad for value in stage.generator.parameters()]
        assert ("generator_loss" in metrics, "pair_loss" in metrics) == (name != "pairs", name == "both")
        assert bool(with_gradient(stage.fake)) == (name != "pairs")
    made, true = stage.generator(batch()["noise"], batch()["label"]), codebook_of(opened.tokenizer)[batch()["codes"]]
    assert metrics["loss"].item() == pytest.approx((made - true).square().sum(-1).mean().item(), rel=1e-6)
    for score, both, pairs in zip(found["scores"], found["both"], found["pairs"], strict=True):
        assert torch.allclose(both, score + 0.5 * pairs, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="nothing is learnt"):
        compose("dd2", [*words, "score_weight=0"])
