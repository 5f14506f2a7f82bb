"""The shipped next-token recipes: networks of the published sizes, guided as published."""

import pytest
import torch
from tokar.conf.compose import compose
from tokar.models.build import build
from tokar.models.samplers.guidance import parse_schedule

MILLIONS = {
    "llamagen_b": 110.9, "llamagen_l": 342.9, "llamagen_xl": 774.7, "llamagen_xxl": 1411.0, "llamagen_3b": 3096.7,
    "gigatok_gpt_b": 110.9 + 257 * 768e-6, "gigatok_gpt_l": 342.9 + 257 * 1024e-6, "gigatok_gpt_xl": 774.7 + 257 * 1280e-6,
    "gigatok_gpt_xxl": 1411.0 + 257 * 1536e-6, "d_ar_l": 342.9, "d_ar_xl": 774.7,
    "llamagen_t2i_xl": 774.7 - 1001 * 1280e-6 + (2048 * 1280 + 1280**2 + 120 * 2048) * 1e-6,
}  # fmt: skip
"""Published, with a table of places where GigaTok has one, and the layers of texts in the place of the classes."""


@pytest.mark.parametrize("name", MILLIONS)
def test_a_network_has_the_published_size(name: str) -> None:
    node = compose("generator", [f"experiment={name}"]).plain["generator"]
    sizes = {"n_tokens": 256} if "positions" in node else {"grid": (16, 16)}
    with torch.device("meta"):
        generator = build({**node, **sizes, "vocab_size": 16384, "num_classes": 1000})
    assert sum(parameter.numel() for parameter in generator.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)
    assert generator.plan.n_tokens == 256


@pytest.mark.parametrize(
    ("name", "first", "last", "guided"),
    [
        ("llamagen_l", 2.0, 2.0, 256),
        ("gigatok_gpt_xl", 1.0, 1.75, 209),
        ("d_ar_l", 1.2, 8.0, 256),
        ("llamagen_t2i_xl", 7.5, 7.5, 256),
    ],
)
def test_guidance_is_as_published(name: str, first: float, last: float, guided: int) -> None:
    composed = compose("generator", [f"experiment={name}"]).typed
    node = {**composed.generator, "dim": 64, "heads": 1, "layers": 1}
    node |= {"condition": None, "vocab_size": 8, "num_classes": 3}
    scales = parse_schedule(composed.sampling.guidance).over(build({**node, "n_tokens": 256}).plan)
    assert (scales[0], scales[-1]) == (pytest.approx(first), pytest.approx(last))
    assert sum(scale != 1 for scale in scales) == guided
