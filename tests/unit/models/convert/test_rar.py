import math

import pytest
import torch
import torch.nn.functional as F
from tokar.errors import UserError
from tokar.models.build import build
from tokar.models.convert.families import recognise
from tokar.models.convert.family import shapes_of
from tokar.models.convert.parity import load_original
from tokar.models.convert.rar import RARGenerator
from torch import Tensor

FAMILY = RARGenerator()
DIM, HEADS, LAYERS, HIDDEN, VOCAB, CLASSES, TOKENS = 24, 2, 2, 40, 11, 5, 9
HEAD = DIM // HEADS


def original() -> dict[str, Tensor]:
    """A random state dict under the original's names."""
    shapes = {
        "cls_token": (1, 1, DIM),
        "embeddings.weight": (VOCAB + 1 + CLASSES + 1, DIM),
        "pos_embed": (1, TOKENS + 1024, DIM),
        "target_aware_pos_embed": (1, TOKENS + 1024, DIM),
        "timesteps_embeddings": (1, TOKENS + 100, DIM),
        "adaln_before_head.adaLN_modulation.1.weight": (2 * DIM, DIM),
        "adaln_before_head.adaLN_modulation.1.bias": (2 * DIM,),
        "lm_head.weight": (VOCAB, DIM),
        "lm_head.bias": (VOCAB,),
    }
    sizes = {
        "norm1": (DIM, 0), "norm2": (DIM, 0), "attn.q_norm": (HEAD, 0), "attn.k_norm": (HEAD, 0), "attn.qkv": (3 * DIM, DIM),
        "attn.proj": (DIM, DIM), "mlp.fc1": (HIDDEN, DIM), "mlp.fc2": (DIM, HIDDEN), "adaLN_modulation.1": (6 * DIM, DIM),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, (rows, columns) in sizes.items():
            shapes[f"blocks.{layer}.{name}.weight"] = (rows, columns) if columns else (rows,)
            shapes[f"blocks.{layer}.{name}.bias"] = (rows,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published(state: dict[str, Tensor], codes: Tensor, label: int, order: list[int]) -> Tensor:
    """Logits `[N, V]` of the codes in an order, slot i + 1 for its i-th, from the original tensors (arXiv:2411.00776)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str | None = None) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x if name is None else x * state[f"{name}.weight"] + state[f"{name}.bias"]

    table, place, aim = state["embeddings.weight"], state["pos_embed"][0], state["target_aware_pos_embed"][0]
    label_vector = table[VOCAB + 1 + label]
    slots = [state["cls_token"][0, 0] + place[0], label_vector + place[1] + aim[2 + order[0]]]
    for before, token in enumerate(order[:-1]):
        slots.append(table[codes[token]] + place[2 + token] + aim[2 + order[before + 1]])
    x = torch.stack(slots)
    signal = F.silu(label_vector + state["timesteps_embeddings"][0, : len(slots)])
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(signal, f"{block}.adaLN_modulation.1").chunk(6, dim=-1)
        qkv = linear(norm(x, f"{block}.norm1") * (1 + scale1) + shift1, f"{block}.attn.qkv").unflatten(-1, (3, HEADS, HEAD))
        query, key = norm(qkv[:, 0], f"{block}.attn.q_norm"), norm(qkv[:, 1], f"{block}.attn.k_norm")
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(HEAD)
        hidden_keys = torch.ones(len(slots), len(slots)).triu(1).bool()
        weights = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, qkv[:, 2]).flatten(1)
        x = x + gate1 * linear(mixed, f"{block}.attn.proj")
        wide = linear(norm(x, f"{block}.norm2") * (1 + scale2) + shift2, f"{block}.mlp.fc1")
        x = x + gate2 * linear(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))), f"{block}.mlp.fc2")
    scale, shift = linear(signal, "adaln_before_head.adaLN_modulation.1").chunk(2, dim=-1)
    return linear(norm(x) * (1 + scale) + shift, "lm_head")[1:]


def test_recognised_and_sized_from_shapes() -> None:
    state = original()
    assert recognise(state).name == "rar"
    node = FAMILY.config_from(shapes_of(state), {})
    assert (node["vocab_size"], node["num_classes"], node["grid"], node["heads"]) == (VOCAB, CLASSES, [3, 3], HEADS)
    assert (node["layers"], node["hidden"]) == (LAYERS, HIDDEN)


def test_round_trip_is_bitwise() -> None:
    state = original()
    model = load_original(FAMILY, state, {}, where="test")
    back = FAMILY.to_theirs(model.state_dict())
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@torch.no_grad()
def test_logits_against_a_plain_second_implementation() -> None:
    state = original()
    model = load_original(FAMILY, state, {}, where="test").eval()
    codes = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    for label in (0, CLASSES):
        for row, got in zip(codes, model.logits(codes, torch.full((2,), label)), strict=True):
            torch.testing.assert_close(got, published(state, row, label, list(range(TOKENS))), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_training_in_random_orders_against_a_plain_second_implementation() -> None:
    state = original()
    model = load_original(FAMILY, state, {"dropout": 0.0, "attn_drop": 0.0}, where="test").train()
    codes = torch.randint(VOCAB, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    noise = torch.rand(3, 1 + TOKENS, generator=torch.Generator().manual_seed(3))
    losses = []
    for row, label, numbers in zip(codes, (4, 1, CLASSES), noise, strict=True):
        order = sorted(range(TOKENS), key=lambda token: numbers[1 + token].item())
        losses.append(F.cross_entropy(published(state, row, label, order), row[order]))
    loss = model.loss(codes, torch.tensor([4, 1, CLASSES]), noise)["loss"]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_a_config_that_contradicts_the_weights_is_refused() -> None:
    with pytest.raises(UserError, match="num_attention_heads is 16 in the config, but 2 in the weights"):
        FAMILY.config_from(shapes_of(original()), {"num_attention_heads": 16})


def test_tables_of_no_square_grid_are_refused() -> None:
    state = {**original(), "pos_embed": torch.zeros(1, 8 + 1024, DIM)}
    with pytest.raises(UserError, match="for 8 tokens"):
        FAMILY.config_from(shapes_of(state), {})


def test_the_node_builds() -> None:
    node = FAMILY.config_from(shapes_of(original()), {})
    with torch.device("meta"):
        model = build(node)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tuple(value.shape) for name, value in FAMILY.to_ours(original())[0].items()
    }
