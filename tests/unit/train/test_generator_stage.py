"""The generator's step: who loses its condition, and what a text becomes."""

import pytest
import torch
from tokar.conf.compose import compose
from tokar.errors import UserError
from tokar.models.generators.conditions import NULL, SEEN, pack_text
from tokar.train.clock import Clock
from tokar.train.generator import DROPOUT_SALT, GeneratorStage
from tokar.train.randomness import sample_uniform

ROWS = 64
TEXT = {"_target_": "tokar.models.generators.conditions.TextCondition", "dim": 16, "features": 6, "tokens": 4}


class Spy:
    """Stands for the wrapped network: keeps what it is called with."""

    def __call__(self, codes, condition, *noise):
        self.condition = condition
        return {"loss": torch.tensor(0.0)}

    def backward(self, loss):
        pass


def make(overrides=(), **node):
    config = compose("generator", ["experiment=digits_llamagen", *overrides]).typed
    sizes = {"vocab_size": 8, "num_classes": 3, "grid": [2, 2], "dim": 16, "heads": 2, "layers": 1}
    return GeneratorStage(config, {**config.generator, **sizes, **node}, None, {})


def step(stage, **batch):
    numbers = torch.arange(ROWS)
    batch = {"codes": torch.zeros(ROWS, 4, dtype=torch.int64), "epoch": numbers * 0, "index": numbers, **batch}
    spy = Spy()
    stage.step(batch, Clock(0, 0, 10, ROWS, ROWS), {"generator": spy})
    dropped = sample_uniform(stage.config.seed, batch["epoch"], batch["index"], DROPOUT_SALT) < stage.config.class_dropout
    return spy.condition, dropped


def test_classes_are_dropped_as_always():
    label = torch.arange(ROWS) % 3
    condition, dropped = step(make(["class_dropout=0.3"]), label=label)
    assert 5 < dropped.sum() < 40
    assert torch.equal(condition, torch.where(dropped, 3, label))


def test_a_dropped_text_keeps_its_padding():
    text = pack_text(torch.randn(ROWS, 4, 6), torch.arange(ROWS) % 4 + 1, 4).half()
    condition, dropped = step(make(["class_dropout=0.3"], condition=TEXT), text=text, label=torch.full((ROWS,), -1))
    assert condition.dtype == torch.float32
    kinds = condition[..., -1]
    assert torch.equal(condition[~dropped], text.float()[~dropped])
    assert set(kinds[~dropped].unique().tolist()) == {0.0, SEEN}
    assert set(kinds[dropped].unique().tolist()) == {0.0, NULL}
    assert torch.equal(kinds != 0, text[..., -1] != 0)


def test_guidance_needs_samples_without_condition():
    with pytest.raises(UserError, match="never learns without its condition"):
        make(["class_dropout=0"])
    make(["class_dropout=0", "sampling.guidance=1"])
