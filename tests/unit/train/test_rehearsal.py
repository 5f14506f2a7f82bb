"""What does not fit is refused before the first step, at no cost: no value is computed and nothing changes."""

import pytest
import torch
from frozen_models import save_random
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.train.rehearsal import rehearse
from tokar.train.tokenizer import TokenizerStage
from torch import nn

SMALL = [
    "data=digits", "tokenizer.encoder.width=32", "tokenizer.encoder.multipliers=[1,2,2]", "tokenizer.encoder.blocks=1",
    "tokenizer.encoder.z_channels=32", "tokenizer.quantizer.codebook_size=16", "discriminator.width=8",
    "discriminator.layers=1", "loop.duration=1",
]  # fmt: skip
GIGATOK = [
    "tokenizer=gigatok", *(f"tokenizer.token_{side}.{size}" for side in ("encoder", "decoder") for size in
                           ("width=32", "layers=1", "heads=2")),
    "tokenizer.token_encoder.patch=4", "tokenizer.token_encoder.tokens=16", "tokenizer.semantic.depth=1", "semantic=dinov2_s",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """DINOv2 of width 16 that sees 4x4 tokens."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("teacher")
    save_random("Dinov2Model", folder, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=56)
    return [f"semantic.teacher.path={folder}", "semantic.teacher.size=56"]


def make(*overrides):
    torch.manual_seed(0)
    return TokenizerStage(compose("tokenizer", [*SMALL, *overrides]).typed)


def modules_of(stage):
    return [item.module for item in stage.trainables.values()]


def start(*overrides):
    stage = make(*overrides)
    rehearse(stage.rehearse, modules_of(stage), (2, 3, 32, 32))
    return stage


@pytest.mark.parametrize(
    "overrides",
    [
        ["losses.lecam_weight=0.1"],
        ["tokenizer.quantizer.restart_after=2", "tokenizer.quantizer.kmeans_batches=1"],
        ["tokenizer=flexvar_small", "tokenizer.scales=[1,2,8]"],
    ],
)
def test_nothing_is_drawn_or_changed(overrides):
    fresh = make(*overrides)
    drawn = torch.rand(1)
    rehearsed = start(*overrides)
    assert torch.equal(torch.rand(1), drawn)
    for module, other in zip(modules_of(rehearsed), modules_of(fresh), strict=True):
        assert module.training
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_teacher_that_fits(teacher):
    start(*GIGATOK, *teacher, "tokenizer.semantic.dim=16")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["discriminator.layers=4"], "PatchGAN with 4 layers needs images of 48 pixels, not 32; give it fewer layers"),
        (["semantic=dinov2_s"], "semantic: this tokenizer has no semantic features; give it a semantic head"),
        (GIGATOK, "tokenizer.semantic.dim: the tokenizer projects to width 768, the teacher's features have width 16; set"),
    ],
)
def test_parts_that_do_not_fit_are_refused(teacher, overrides, line):
    with pytest.raises(UserError) as refused:
        start(*overrides, *(teacher if any("semantic=" in override for override in overrides) else []))
    assert str(refused.value).startswith(line)


def test_tokens_that_are_no_square_cannot_follow_a_teachers(teacher):
    oblong = make(*GIGATOK, *teacher, "tokenizer.semantic.dim=16")
    oblong.teacher.forward = lambda image: torch.empty(2, 15, 16)
    with pytest.raises(UserError, match="has 64 semantic features, the teacher 15: no square grids to resample between"):
        rehearse(oblong.rehearse, [], (2, 3, 32, 32))


def test_a_part_that_looks_at_values_is_let_pass():
    class Curious(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    module = Curious()
    rehearse(module, [module], (2, 3))
    assert module.training
