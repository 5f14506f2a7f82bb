"""Weights of the relatives of LlamaGen's GPT, against a second forward pass written from the original tensors."""

import pytest
import torch
import torch.nn.functional as F
from tokar.errors import UserError
from tokar.models.build import build, load_model
from tokar.models.convert import families
from tokar.models.convert.family import shapes_of
from tokar.models.convert.files import convert_file, export_original
from tokar.models.convert.parity import load_original
from tokar.models.generators.conditions import pack_text
from tokar.models.generators.next_token import SIZES
from tokar.models.samplers.decode import sample
from torch import Tensor

DIM, HEADS, LAYERS, HIDDEN, VOCAB, CLASSES, TOKENS = 24, 2, 2, 64, 20, 7, 9
HEAD = DIM // HEADS
CONFIG = {"n_head": HEADS, "block_size": TOKENS}
SWITCHES = [(False, "none"), (True, "none"), (False, "block"), (True, "shared")]
TEXT_TOKENS, FEATURES = 5, 10


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def blocks(dim: int = DIM, layers: int = LAYERS, hidden: int = HIDDEN, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(layers):
        at = f"layers.{layer}."
        shapes |= {at + "attention.wqkv.weight": (3 * dim, dim), at + "attention.wo.weight": (dim, dim)}
        shapes |= {at + "feed_forward.w1.weight": (hidden, dim), at + "feed_forward.w3.weight": (hidden, dim)}
        shapes |= {at + "feed_forward.w2.weight": (dim, hidden)}
        shapes |= {at + "attention_norm.weight": (dim,), at + "ffn_norm.weight": (dim,)}
    return {**shapes, "norm.weight": (dim,), "output.weight": (vocab, dim)}


def of_classes() -> dict[str, Tensor]:
    return draw({"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM), **blocks()})


def of_texts() -> dict[str, Tensor]:
    up, down = {"cls_embedding.cap_proj.fc1.weight": (DIM, FEATURES)}, {"cls_embedding.cap_proj.fc2.weight": (DIM, DIM)}
    return draw({**up, **down, "cls_embedding.uncond_embedding": (TEXT_TOKENS, FEATURES), **blocks()})


def gigatok(qk_norm: bool, modulation: str) -> dict[str, Tensor]:
    shapes = {"cls_embedding.embedding_table.weight": (CLASSES + 1, DIM), "positional_embedding": (1 + TOKENS, DIM), **blocks()}
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        if qk_norm:
            shapes |= {f"{at}attention.{side}_norm.{part}": (HEAD,) for side in "qk" for part in ("weight", "bias")}
        if modulation == "block":
            shapes |= {at + "adaLN_modulation.1.weight": (6 * DIM, DIM), at + "adaLN_modulation.1.bias": (6 * DIM,)}
        if modulation == "shared":
            shapes[at + "ada_gss"] = (1, 1, 6, DIM)
    if modulation == "shared":
        shapes |= {"adaLN.1.weight": (6 * DIM, DIM), "adaLN.1.bias": (6 * DIM,)}
    if modulation != "none":
        shapes |= {"final_adaLN.1.weight": (2 * DIM, DIM), "final_adaLN.1.bias": (2 * DIM,)}
    return draw(shapes)


class Published:
    """The original forward pass over a prefix `[P, C]` and codes `[N]`, one sample, head by head.

    Args:
        state: original tensors.
        angles: `[P + N - 1, HEAD / 2]` rotary angles; NaN: the slot's queries and keys are zero. `None`: none.
        seen: `[P]` prefix slots that are no padding; `None`: all.
    """

    def __init__(self, state: dict[str, Tensor], angles: Tensor | None = None, seen: Tensor | None = None) -> None:
        self.state, self.angles, self.seen = state, angles, seen

    def __call__(self, prefix: Tensor, codes: Tensor) -> Tensor:
        state = self.state
        x = torch.cat((prefix, state["tok_embeddings.weight"][codes[:-1]]))
        if "positional_embedding" in state:
            x = x + state["positional_embedding"][: len(x)]
        signal = F.silu(x[0])
        for layer in range(LAYERS):
            self.at = f"layers.{layer}."
            shift1, scale1, gate1, shift2, scale2, gate2 = self.six(signal)
            x = x + gate1 * self.attention(self.norm(x, self.at + "attention_norm") * (1 + scale1) + shift1)
            h = self.norm(x, self.at + "ffn_norm") * (1 + scale2) + shift2
            gated = F.silu(h @ state[self.at + "feed_forward.w1.weight"].T) * (h @ state[self.at + "feed_forward.w3.weight"].T)
            x = x + gate2 * (gated @ state[self.at + "feed_forward.w2.weight"].T)
        x = self.norm(x, "norm")
        if "final_adaLN.1.weight" in state:
            shift, scale = (state["final_adaLN.1.weight"] @ signal + state["final_adaLN.1.bias"]).chunk(2)
            x = x * (1 + scale) + shift
        return x[len(prefix) - 1 :] @ state["output.weight"].T

    def six(self, signal: Tensor) -> tuple[Tensor, ...]:
        weight = self.state.get(self.at + "adaLN_modulation.1.weight", self.state.get("adaLN.1.weight"))
        if weight is None:
            nothing, one = torch.zeros(DIM), torch.ones(DIM)
            return nothing, nothing, one, nothing, nothing, one
        bias = self.state.get(self.at + "adaLN_modulation.1.bias", self.state.get("adaLN.1.bias"))
        vectors = (weight @ signal + bias).view(6, DIM)
        return (vectors + self.state.get(self.at + "ada_gss", torch.zeros(1, 1, 6, DIM))[0, 0]).unbind()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * self.state[name + ".weight"]

    def turned(self, x: Tensor, name: str) -> Tensor:
        """Queries or keys `[L, HEAD]`, perhaps normed and turned."""
        if self.at + f"attention.{name}_norm.weight" in self.state:
            weight, bias = (self.state[self.at + f"attention.{name}_norm.{part}"] for part in ("weight", "bias"))
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * weight + bias
        if self.angles is None:
            return x
        turn = torch.polar(torch.ones_like(self.angles), self.angles)
        turned = torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2)) * turn[: len(x)]).flatten(1)
        return torch.where(self.angles[: len(x), :1].isnan(), 0.0, turned)

    def attention(self, h: Tensor) -> Tensor:
        qkv = (h @ self.state[self.at + "attention.wqkv.weight"].T).view(len(h), 3, HEADS, HEAD)
        seen = torch.ones(len(h), dtype=torch.bool)
        if self.seen is not None:
            seen[: len(self.seen)] = self.seen
        mask = (torch.ones(len(h), len(h)).tril().bool() & seen) | torch.eye(len(h)).bool()
        parts = []
        for head in range(HEADS):
            query, key = self.turned(qkv[:, 0, head], "q"), self.turned(qkv[:, 1, head], "k")
            scores = (query @ key.T / HEAD**0.5).masked_fill(~mask, float("-inf"))
            parts.append(scores.softmax(-1) @ qkv[:, 2, head])
        return torch.cat(parts, dim=1) @ self.state[self.at + "attention.wo.weight"].T


def grid_angles(prefix: int) -> Tensor:
    """LlamaGen's: half of the pairs by row, half by column; none for the prefix."""
    rates = 10000.0 ** (-torch.arange(0, HEAD // 2, 2) / (HEAD // 2))
    cells = [torch.cat((row * rates, column * rates)) for row in range(3) for column in range(3)]
    return torch.stack([torch.full((HEAD // 2,), float("nan"))] * prefix + cells)


def row_angles() -> Tensor:
    """D-AR's: the class at 0, the tokens after it."""
    return torch.arange(1 + TOKENS)[:, None] * 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)


def codes(rows: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def same(model: torch.nn.Module, condition: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model.logits(codes(), condition)[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("qk_norm", "modulation"), SWITCHES)
def test_gigatok(qk_norm: bool, modulation: str) -> None:
    state = gigatok(qk_norm, modulation)
    family = families.recognise(state)
    assert family.name == "gigatok_gpt"
    model = load_original(family, state, {"n_head": HEADS}, where="test")
    assert model.plan.n_tokens == TOKENS
    prefix = state["cls_embedding.embedding_table.weight"][[4]]
    same(model, torch.tensor([4]), Published(state)(prefix, codes()[0]))


@torch.no_grad()
def test_d_ar_must_be_named() -> None:
    state = of_classes()
    assert families.recognise(state).name == "llamagen_gpt"
    model = load_original(families.get("d_ar"), state, CONFIG, where="test")
    prefix = state["cls_embedding.embedding_table.weight"][[4]]
    expected = Published(state, row_angles())(prefix, codes()[0])
    same(model, torch.tensor([4]), expected)
    other = load_original(families.get("llamagen_gpt"), state, CONFIG, where="test")
    assert not torch.allclose(other.logits(codes(), torch.tensor([4]))[0], expected, atol=1e-2)


@torch.no_grad()
def test_llamagen_of_texts() -> None:
    """A text of 3 features in 5 slots, and the same slots without their text."""
    state = of_texts()
    family = families.recognise(state)
    assert family.name == "llamagen_gpt"
    model = load_original(family, state, CONFIG, where="test")
    features = torch.randn(1, 3, FEATURES, generator=torch.Generator().manual_seed(2))
    text = pack_text(features, torch.tensor([3]), TEXT_TOKENS)
    seen = torch.tensor([False, False, True, True, True])
    reference = Published(state, grid_angles(TEXT_TOKENS), seen)
    padded = torch.cat((torch.zeros(2, FEATURES), features[0]))
    for given, condition in ((padded, text), (state["cls_embedding.uncond_embedding"], model.null(text))):
        hidden = F.gelu(given @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        expected = reference(hidden @ state["cls_embedding.cap_proj.fc2.weight"].T, codes()[0])
        same(model, condition, expected)
    answers = {"indices": codes(), "text_features": padded[None], "text_mask": seen[None].float()}
    assert torch.equal(family.answers({"state": model}, answers, {})["logits"], model.logits(codes(), text))
    assert sample(model, text, seed=0, guidance=2.0).shape == (1, TOKENS)


STATES = {
    **{f"gigatok_gpt {qk_norm} {modulation}": gigatok(qk_norm, modulation) for qk_norm, modulation in SWITCHES},
    "d_ar": of_classes(), "llamagen_gpt": of_texts(),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_round_trip_is_bitwise(name: str, tmp_path) -> None:
    state, family = STATES[name], name.split()[0]
    torch.save({"model": state}, tmp_path / "model.pt")
    config = {"n_head": HEADS} if family == "gigatok_gpt" else CONFIG
    report = convert_file(tmp_path / "model.pt", tmp_path / "folder", family, config)
    assert (report.family, report.dropped) == (family, [])
    assert load_model(tmp_path / "folder").vocab_size == VOCAB
    export_original(tmp_path / "folder", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_gigatok_sizes_from_shapes_alone(size: str) -> None:
    dim, layers, heads = SIZES[size]
    hidden = {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096}[size]
    shapes = {
        "cls_embedding.embedding_table.weight": (1001, dim), "positional_embedding": (257, dim),
        **blocks(dim, layers, hidden, 16384),
    }  # fmt: skip
    family = families.get("gigatok_gpt")
    node = family.config_from(shapes, {})
    with torch.device("meta"):
        model = build(node)
        ours, _ = family.to_ours({name: torch.empty(shape) for name, shape in shapes.items()})
    assert (node["heads"], node["n_tokens"], node["multiple_of"]) == (heads, 256, 256)
    assert shapes_of(model.state_dict()) == shapes_of(ours)


@pytest.mark.parametrize("tokens", [256, 1024])
def test_llamagen_xl_of_texts_from_shapes_alone(tokens: int) -> None:
    dim, layers, heads = SIZES["XL"]
    shapes = {
        "cls_embedding.cap_proj.fc1.weight": (dim, 2048), "cls_embedding.cap_proj.fc2.weight": (dim, dim),
        "cls_embedding.uncond_embedding": (120, 2048), **blocks(dim, layers, 3584, 16384),
    }  # fmt: skip
    family = families.get("llamagen_gpt")
    node = family.config_from(shapes, {} if tokens == 256 else {"block_size": tokens})
    assert (node["heads"], node["grid"]) == (heads, [int(tokens**0.5)] * 2)
    with torch.device("meta"):
        assert build(node).plan.n_slots == 119 + tokens


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"positional_embedding": None, "adaLN.1.weight": torch.zeros(6 * DIM, DIM)}, {}, "rotary places"),
        ({}, {"rope": True}, "rotary places"),
        ({}, {"block_size": 16}, "block_size is 16 in the config, but 9"),
        ({}, {"num_classes": 1000}, "num_classes is 1000 in the config, but 7"),
        ({"cls_embedding.embedding_table.weight": None}, {}, "without cls_embedding"),
    ],
)
def test_a_gigatok_that_cannot_be_read(change: dict[str, Tensor | None], config: dict[str, object], message: str) -> None:
    state = {name: value for name, value in {**gigatok(False, "none"), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        families.get("gigatok_gpt").config_from(shapes_of(state), {"n_head": HEADS, **config})


def test_a_tensor_without_a_place_is_refused() -> None:
    state = gigatok(False, "block") | {"layers.0.ada_gss": torch.zeros(1, 1, 6, DIM)}
    with pytest.raises(UserError, match=r"unexpected transformer\.blocks\.0\.offset"):
        load_original(families.get("gigatok_gpt"), state, {"n_head": HEADS}, where="test")
