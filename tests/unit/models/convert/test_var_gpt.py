"""VAR's transformer: names, sizes, round trips; its numbers are compared in test_next_scale.py and with the original's."""

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
from tokar.models.convert.parity import load_original, run_parity
from tokar.models.convert.var_gpt import VARGPT
from torch import Tensor

FAMILY = VARGPT()
SIDES = (1, 2, 3)
CONFIG = {"patch_nums": SIDES, "num_heads": 2}


def original(
    dim: int = 32, layers: int = 2, heads: int = 2, shared: bool = False, unit: bool = True, sides: tuple[int, ...] = SIDES
) -> dict[str, Tensor]:
    """A random state dict under the original's names, with its buffers."""
    vocab, classes, width, places = 24, 7, 6, sum(side**2 for side in sides)
    shapes = {
        "pos_start": (1, sides[0] ** 2, dim),
        "pos_1LC": (1, places, dim),
        "word_embed.weight": (dim, width),
        "word_embed.bias": (dim,),
        "class_emb.weight": (classes + 1, dim),
        "lvl_embed.weight": (len(sides), dim),
    }
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * dim, dim), "shared_ada_lin.1.bias": (6 * dim,)}
    for layer in range(layers):
        stem = f"blocks.{layer}."
        if shared:
            shapes[stem + "ada_gss"] = (1, 1, 6, dim)
        if unit:
            shapes[stem + "attn.scale_mul_1H11"] = (1, heads, 1, 1)
        shapes |= {
            stem + "attn.q_bias": (dim,),
            stem + "attn.v_bias": (dim,),
            stem + "attn.mat_qkv.weight": (3 * dim, dim),
            stem + "attn.proj.weight": (dim, dim),
            stem + "attn.proj.bias": (dim,),
            stem + "ffn.fc1.weight": (4 * dim, dim),
            stem + "ffn.fc1.bias": (4 * dim,),
            stem + "ffn.fc2.weight": (dim, 4 * dim),
            stem + "ffn.fc2.bias": (dim,),
        }
        if not shared:
            shapes |= {stem + "ada_lin.1.weight": (6 * dim, dim), stem + "ada_lin.1.bias": (6 * dim,)}
    shapes |= {"head_nm.ada_lin.1.weight": (2 * dim, dim), "head_nm.ada_lin.1.bias": (2 * dim,)}
    shapes |= {"head.weight": (vocab, dim), "head.bias": (vocab,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    level = torch.tensor([scale for scale, side in enumerate(sides) for _ in range(side**2)])
    mask = torch.zeros(places, places)
    mask[level[:, None] < level] = -torch.inf
    zeros = {f"blocks.{layer}.attn.zero_k_bias": torch.zeros(dim) for layer in range(layers)}
    return state | zeros | {"lvl_1L": level[None], "attn_bias_for_masking": mask[None, None]}


def test_parity_with_the_original(shared_parity: Path) -> None:
    report = run_parity(shared_parity / "var.safetensors")
    names = {"indices", "teacher_forcing_input", "logits", "reconstruction", "greedy_image_cfg1.5"}
    assert {comparison.name for comparison in report.comparisons} == names
    assert report.ok


def test_parity_fails_on_other_weights(shared_parity: Path, tmp_path: Path) -> None:
    """Every tensor of a kind matters: one changed a little moves the logits past the tolerance."""
    with safe_open(shared_parity / "var.safetensors", "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    ours = [name for name in tensors if name.startswith("var.") and not name.endswith(derived)]
    for name in [name for name in ours if ".blocks." not in name or ".blocks.0." in name]:
        noise = 0.1 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
        save_file(
            {**tensors, name: (tensors[name] + noise).to(tensors[name].dtype)}, tmp_path / "changed.safetensors", metadata
        )
        assert not run_parity(tmp_path / "changed.safetensors").ok, name


@pytest.mark.parametrize("shared", [False, True], ids=["block", "shared"])
@pytest.mark.parametrize("unit", [False, True], ids=["plain", "l2"])
@pytest.mark.parametrize(("dim", "heads", "layers", "sides"), [(32, 2, 2, (1, 2, 3)), (48, 3, 1, (1, 3)), (64, 1, 3, (2, 4))])
def test_round_trip_is_bitwise(shared: bool, unit: bool, dim: int, heads: int, layers: int, sides: tuple[int, ...]) -> None:
    state = original(dim, layers, heads, shared, unit, sides)
    config = {"patch_nums": sides, "num_heads": heads}
    model = load_original(FAMILY, state, config, where="test")
    node = FAMILY.config_from(shapes_of(state), config)
    back = FAMILY.finish(FAMILY.to_theirs(model.state_dict()), node)
    assert sorted(back) == sorted(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name
    assert (model.transformer.config.heads, model.transformer.config.qk_norm) == (heads, "l2" if unit else "none")


@pytest.mark.parametrize("beside", ["alone", "nested", "flat"])
def test_a_file_goes_there_and_back(tmp_path: Path, beside: str) -> None:
    """A trainer's checkpoint, perhaps with the tokenizer beside it; the heads are 64 wide, as published."""
    state = original(128, 1, shared=True)
    content = {
        "alone": {"trainer": {"var_wo_ddp": state}, "epoch": 3},
        "nested": {"trainer": {"vae_local": {"x": torch.zeros(1)}, "var_wo_ddp": state}},
        "flat": {f"trainer.var_wo_ddp.{name}": value for name, value in state.items()}
        | {"trainer.vae_local.x": torch.zeros(1)},
    }[beside]
    torch.save(content, tmp_path / "var.pth")
    family = None if beside == "alone" else "var"
    report = convert_file(tmp_path / "var.pth", tmp_path / "model", family, {"patch_nums": SIDES})
    assert report.family == "var"
    assert sorted(report.dropped) == ["attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "lvl_1L"]
    assert (report.node["heads"], report.node["grids"]) == (2, [[1, 1], [2, 2], [3, 3]])
    assert load_model(tmp_path / "model").plan.n_tokens == 14
    export_original(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    back = back.get("model", back)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("depth", "shared", "sides"),
    [
        (16, False, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        (30, False, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        (36, True, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
        (2, False, (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)),
    ],
)
def test_published_checkpoints_from_shapes_alone(depth: int, shared: bool, sides: tuple[int, ...]) -> None:
    """No config: the scales follow from the number of places."""
    with torch.device("meta"):
        small = {name: tuple(value.shape) for name, value in original(4, 1, 2, shared, True, (1,)).items()}
        dim, places = 64 * depth, sum(side**2 for side in sides)
        sizes = {4: dim, 12: 3 * dim, 16: 4 * dim, 24: 6 * dim}

        def grown(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
            if name.endswith("scale_mul_1H11"):
                return (1, depth, 1, 1)
            if name in ("pos_1LC", "lvl_embed.weight"):
                return (1, places, dim) if name == "pos_1LC" else (len(sides), dim)
            if name in ("head.weight", "head.bias"):
                return (4096, *([dim] if name == "head.weight" else []))
            if name.endswith("ada_gss"):
                return (1, 1, 6, dim)
            if name == "head_nm.ada_lin.1.weight":
                return (2 * dim, dim)
            return (2 * dim,) if name == "head_nm.ada_lin.1.bias" else tuple(sizes.get(size, size) for size in shape)

        shapes = {name: grown(name, shape) for name, shape in small.items() if name not in ("lvl_1L", "attn_bias_for_masking")}
        shapes = {
            name.replace("blocks.0.", f"blocks.{layer}."): shape
            for name, shape in shapes.items()
            for layer in range(depth if name.startswith("blocks.") else 1)
        }
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        node = FAMILY.config_from(shapes_of(state), {})
        ours, _ = FAMILY.to_ours(state)
        model = build(node)
    assert [rows for rows, _ in node["grids"]] == list(sides)
    assert (node["heads"], node["shared_modulation"], node["qk_l2"]) == (depth, shared, True)
    assert shapes_of(model.state_dict()) == shapes_of(ours)


def test_it_is_recognised() -> None:
    assert recognise(original()).name == "var"
    assert recognise(original(shared=True, unit=False)).name == "var"


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn.mat_qkv.weight", "blocks.0.attn.q_bias", "blocks.1.attn.v_bias", "blocks.0.ada_lin.1.bias",
        "head_nm.ada_lin.1.weight", "pos_start", "head.bias",
    ],
)  # fmt: skip
def test_a_missing_tensor_is_named(name: str) -> None:
    state = original()
    del state[name]
    with pytest.raises(UserError, match="weights do not fit NextScale: missing "):
        load_original(FAMILY, state, CONFIG, where="test")


@pytest.mark.parametrize("name", ["blocks.0.attn.mat_qkv.bias", "blocks.0.attn.k_bias", "blocks.2.ffn.fc1.weight", "extra"])
def test_an_unknown_tensor_is_refused(name: str) -> None:
    state = original() | {name: torch.zeros(32)}
    with pytest.raises(UserError, match=r"weights do not fit NextScale"):
        load_original(FAMILY, state, CONFIG, where="test")


def test_a_bias_of_the_keys_that_is_not_zero_is_refused() -> None:
    state = original()
    state["blocks.0.attn.zero_k_bias"] = torch.ones(32)
    with pytest.raises(UserError, match="bias of the keys"):
        load_original(FAMILY, state, CONFIG, where="test")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 3, "patch_nums": SIDES}, "depth is 3 in the config, but 2"),
        ({"embed_dim": 64, "patch_nums": SIDES}, "embed_dim is 64 in the config, but 32"),
        ({"num_classes": 1000, "patch_nums": SIDES}, "num_classes is 1000 in the config, but 7"),
        ({"shared_aln": True, "patch_nums": SIDES}, "shared_aln is True in the config, but False"),
        ({"attn_l2_norm": False, "patch_nums": SIDES}, "attn_l2_norm is False in the config, but True"),
        ({"mlp_ratio": 2, "patch_nums": SIDES}, "mlp_ratio is 2 in the config, but 4"),
        ({"norm_eps": 1e-5, "patch_nums": SIDES}, "norm_eps is 1e-05 in the config, but 1e-06"),
        ({"patch_nums": (1, 2, 4)}, "do not make the 14 places"),
        ({}, "3 scales of unknown sides, 14 places"),
    ],
)
def test_a_config_that_contradicts_the_weights(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FAMILY.config_from(shapes_of(original()), config)
