"""Every option of conf/tokenizer/quantizer composes with `tokenizer=vqgan`, and learns from random images."""

from pathlib import Path

import pytest
import torch
from tokar.conf.compose import compose
from tokar.models.build import build

FOLDER = Path(__file__).resolve().parents[5] / "conf/tokenizer/quantizer"
OPTIONS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"multiscale"})  # which is MultiScaleVQ's
SMALL = [
    "loop.duration=1", "tokenizer=vqgan", "data.image_size=8", "tokenizer.encoder.width=32",
    "tokenizer.encoder.multipliers=[1,2]", "tokenizer.encoder.blocks=1", "tokenizer.decoder.blocks=1",
    "tokenizer.encoder.z_channels=32",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_composes_and_learns(option):
    torch.manual_seed(0)
    model = build(compose("tokenizer", [*SMALL, f"tokenizer/quantizer={option}"]).typed.tokenizer)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    optimizer, errors = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(6):
        output = model(images)
        assert output.codes.shape == (4, model.layout.total_tokens)
        error = (output.reconstruction - images).square().mean()
        optimizer.zero_grad()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < errors[0]
    model.eval()
    output = model(images)
    assert torch.equal(model.decode(output.codes), output.reconstruction)


@pytest.mark.parametrize("option", ["residual", "product"])
def test_parts_can_be_any_option_and_are_overridden_by_name(option):
    key = {"residual": "levels.level1", "product": "parts.second"}[option]
    config = compose(
        "tokenizer", [*SMALL, f"tokenizer/quantizer={option}", f"tokenizer/quantizer@tokenizer.quantizer.{key}=simvq"]
    ).typed
    node = config.tokenizer["quantizer"]
    for step in key.split("."):
        node = node[step]
    assert node["_target_"].endswith(".SimVQ")
    sizes = {stream.vocab_size for stream in build(config.tokenizer).layout.streams}
    assert 16384 in sizes
