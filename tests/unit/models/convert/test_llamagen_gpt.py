from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokar.errors import UserError
from tokar.models.build import build, load_model
from tokar.models.convert.families import recognise
from tokar.models.convert.family import shapes_of
from tokar.models.convert.files import convert_file, export_original
from tokar.models.convert.llamagen_gpt import LlamaGenGPT
from tokar.models.convert.parity import load_original, run_parity
from tokar.models.generators.next_token import SIZES
from torch import Tensor

FAMILY = LlamaGenGPT()


def original(dim: int = 32, layers: int = 2, hidden: int = 96, vocab: int = 24, classes: int = 7) -> dict[str, Tensor]:
    """A random state dict under the original's names."""
    shapes = {"cls_embedding.embedding_table.weight": (classes + 1, dim), "tok_embeddings.weight": (vocab, dim)}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * dim, dim),
            f"layers.{layer}.attention.wo.weight": (dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{layer}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{layer}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{layer}.attention_norm.weight": (dim,),
            f"layers.{layer}.ffn_norm.weight": (dim,),
        }
    shapes |= {"norm.weight": (dim,), "output.weight": (vocab, dim)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_parity_with_the_original(shared_parity: Path) -> None:
    report = run_parity(shared_parity / "llamagen_gpt.safetensors")
    assert {comparison.name for comparison in report.comparisons} == {"logits", "greedy_cfg2"}
    assert report.ok


def test_parity_fails_on_other_weights(shared_parity: Path, tmp_path: Path) -> None:
    """Every tensor matters: one changed a little moves the logits past the tolerance."""
    with safe_open(shared_parity / "llamagen_gpt.safetensors", "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    for name in [name for name in tensors if name.startswith("state.")]:
        changed = {**tensors, name: tensors[name] + 0.1 * torch.randn(tensors[name].shape).half()}
        save_file(changed, tmp_path / "changed.safetensors", metadata)
        assert not run_parity(tmp_path / "changed.safetensors").ok, name


@pytest.mark.parametrize(
    ("dim", "heads", "layers", "hidden"), [(32, 2, 2, 96), (60, 3, 1, 160), (200, 2, 3, 768), (32, 8, 1, 86)]
)
def test_round_trip_is_bitwise(dim: int, heads: int, layers: int, hidden: int) -> None:
    state = original(dim, layers, hidden)
    model = load_original(FAMILY, state, {"n_head": heads, "block_size": 64}, where="test")
    assert model.plan.grid == (8, 8)
    assert model.transformer.config.head_dim == dim // heads
    back = FAMILY.to_theirs(model.state_dict())
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_logits_against_a_plain_second_implementation() -> None:
    """The published forward pass, one sample and one position at a time, from the original tensors."""
    dim, heads = 24, 2
    state = original(dim, 1, 64)
    model = load_original(FAMILY, state, {"n_head": heads, "block_size": 9}, where="test")
    codes = torch.randint(24, (1, 9), generator=torch.Generator().manual_seed(1))
    head_dim, half = dim // heads, dim // heads // 2
    rates = 10000.0 ** (-torch.arange(0, half, 2) / half)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * state[name]

    def turn(x: Tensor, slot: int) -> Tensor:
        if slot == 0:
            return torch.zeros_like(x)
        row, column = divmod(slot - 1, 3)
        phase = torch.exp(1j * torch.cat((row * rates, column * rates)))
        return torch.view_as_real(torch.view_as_complex(x.view(half, 2).clone()) * phase).flatten()

    x = torch.cat((state["cls_embedding.embedding_table.weight"][[4]], state["tok_embeddings.weight"][codes[0, :-1]]))
    qkv = (norm(x, "layers.0.attention_norm.weight") @ state["layers.0.attention.wqkv.weight"].T).view(9, 3, heads, head_dim)
    mixed = torch.zeros(9, heads, head_dim)
    for head in range(heads):
        keys = torch.stack([turn(qkv[slot, 1, head], slot) for slot in range(9)])
        for slot in range(9):
            weights = (keys[: slot + 1] @ turn(qkv[slot, 0, head], slot) / head_dim**0.5).softmax(0)
            mixed[slot, head] = weights @ qkv[: slot + 1, 2, head]
    x = x + mixed.flatten(1) @ state["layers.0.attention.wo.weight"].T
    h = norm(x, "layers.0.ffn_norm.weight")
    gate = h @ state["layers.0.feed_forward.w1.weight"].T
    x = (
        x
        + (gate * gate.sigmoid() * (h @ state["layers.0.feed_forward.w3.weight"].T))
        @ state["layers.0.feed_forward.w2.weight"].T
    )
    expected = norm(x, "norm.weight") @ state["output.weight"].T
    torch.testing.assert_close(model.logits(codes, torch.tensor([4]))[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_published_checkpoints_from_shapes_alone(size: str) -> None:
    dim, layers, heads = SIZES[size]
    hidden = {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096, "3B": 8704}[size]
    with torch.device("meta"):
        state = {name: torch.empty(value.shape) for name, value in _meta(dim, layers, hidden).items()}
        node = FAMILY.config_from(shapes_of(state), {})
        ours, _ = FAMILY.to_ours(state)
        model = build(node)
    assert (node["heads"], node["multiple_of"], node["grid"]) == (heads, 256, [16, 16])
    assert shapes_of(model.state_dict()) == shapes_of(ours)


def _meta(dim: int, layers: int, hidden: int) -> dict[str, Tensor]:
    small = original(4, layers, 6, vocab=5, classes=2)
    sizes = {4: dim, 12: 3 * dim, 6: hidden, 5: 16384, 3: 1001}
    return {name: torch.empty([sizes[size] for size in value.shape], device="meta") for name, value in small.items()}


def test_wrapped_compiled_checkpoint_with_a_rotary_table(tmp_path: Path) -> None:
    state = original()
    wrapped = {f"_orig_mod.{name}": value for name, value in state.items()} | {"_orig_mod.freqs_cis": torch.zeros(1 + 36, 4, 2)}
    torch.save({"model": wrapped, "steps": 5}, tmp_path / "gpt.pt")
    report = convert_file(tmp_path / "gpt.pt", tmp_path / "model")
    assert (report.family, report.wrapper, report.dropped) == ("llamagen_gpt", "model", ["freqs_cis"])
    assert (report.node["grid"], report.node["heads"]) == ([6, 6], 4)
    model = load_model(tmp_path / "model")
    assert model.logits(torch.zeros(1, 36, dtype=torch.int64), torch.tensor([7])).shape == (1, 36, 24)
    export_original(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert {name: value.tolist() for name, value in back.items()} == {name: value.tolist() for name, value in state.items()}


def test_a_text_without_its_unconditional_features_is_refused() -> None:
    state = original()
    del state["cls_embedding.embedding_table.weight"]
    state |= {"cls_embedding.cap_proj.fc1.weight": torch.zeros(4, 4)}
    assert recognise(state).name == "llamagen_gpt"
    with pytest.raises(UserError, match=r"without cls_embedding\.uncond_embedding"):
        FAMILY.config_from(shapes_of(state), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 3}, "n_layer is 3 in the config, but 2"),
        ({"num_classes": 1000}, "num_classes is 1000 in the config, but 7"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"block_size": 17}, "block_size 17 is not a square"),
        ({"n_head": 5}, "5 heads do not fit a width of 32"),
        ({"n_head": 4, "n_kv_head": 2}, "grouped queries"),
        ({"n_head": 4, "multiple_of": 256}, "does not follow from dim 32"),
    ],
)
def test_a_config_that_contradicts_the_weights(config: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.config_from(shapes_of(original()), config)


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w3.weight", "layers.0.feed_forward.w1.weight", "norm.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    state = original()
    config = {"n_head": 2, "multiple_of": 32}
    node_shapes = shapes_of(state)
    del state[name]
    if name.startswith("layers.0.feed_forward.w1"):
        node_shapes.pop(name)
        with pytest.raises(UserError, match="feed_forward"):
            FAMILY.config_from(node_shapes, config)
        return
    with pytest.raises(UserError, match="weights do not fit NextToken"):
        load_original(FAMILY, state, config, where="test")


def test_an_unknown_tensor_is_refused() -> None:
    state = original() | {"layers.0.attention.k_norm.weight": torch.zeros(16)}
    with pytest.raises(UserError, match=r"unexpected transformer\.blocks\.0\.attention\.k_norm"):
        load_original(FAMILY, state, {"n_head": 2}, where="test")
