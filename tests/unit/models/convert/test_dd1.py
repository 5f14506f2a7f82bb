"""Distilled Decoding's public students: names, sizes, round trips, and the original's answers."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokar.models.convert.dd1 import DD1VAR, DD1LlamaGen
from tokar.models.convert.families import recognise
from tokar.models.convert.family import shapes_of
from tokar.models.convert.files import convert_file, export_original
from tokar.models.convert.parity import load_original, run_parity
from tokar.models.distill.scale_student import ScaleStudent
from tokar.models.distill.token_student import TokenStudent
from tokar.models.generators.next_scale import NextScale
from tokar.models.generators.next_token import NextToken


def scale_state(shared=False, unit=True, flag_layers=True, grids=((1, 1), (2, 2), (3, 3))):
    torch.manual_seed(0)
    teacher = NextScale(24, 7, grids, 6, dim=32, layers=2, heads=2, shared_modulation=shared, qk_l2=unit)
    student = ScaleStudent(teacher, (0, 1), 2, flag_layers)
    node = {"teacher": {"grids": [list(grid) for grid in grids]}}
    return DD1VAR().finish(DD1VAR().to_theirs(student.state_dict()), node)


def token_state():
    torch.manual_seed(0)
    return DD1LlamaGen().to_theirs(
        TokenStudent(NextToken(24, 7, grid=(3, 3), dim=32, layers=2, heads=2), 6, (0, 4), 5).state_dict()
    )


def test_parity_with_the_original(shared_parity: Path) -> None:
    report = run_parity(shared_parity / "dd1_var.safetensors")
    names = {"step1_logits", "step1_continuous", "step1_sequence", "step1_image", "step2_sequence", "step2_image"}
    assert {comparison.name for comparison in report.comparisons} == names
    assert report.family == "dd1_var"
    assert report.ok


@pytest.mark.parametrize(
    "name",
    ["n_d_embed.weight", "layerwise_n_d_embed.0.weight", "layerwise_n_d_embed.2.bias", "pos_start", "lvl_embed.weight",
     "final_layer_conti.scale_shift_table", "head_nm.ada_lin.1.weight"],
)  # fmt: skip
def test_parity_fails_on_other_weights(shared_parity: Path, tmp_path: Path, name: str) -> None:
    with safe_open(shared_parity / "dd1_var.safetensors", "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        metadata = content.metadata()
    key = f"student.{name}"
    noise = 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, key: (tensors[key] + noise).half()}, tmp_path / "changed.safetensors", metadata)
    assert not run_parity(tmp_path / "changed.safetensors").ok


@pytest.mark.parametrize("flag_layers", [False, True], ids=["plain", "layerwise"])
@pytest.mark.parametrize(("shared", "unit"), [(False, True), (True, False)], ids=["l2", "shared"])
def test_the_student_of_var_goes_there_and_back(shared: bool, unit: bool, flag_layers: bool) -> None:
    state = scale_state(shared, unit, flag_layers)
    assert recognise(state).name == "dd1_var"
    config = {"patch_nums": (1, 2, 3), "num_heads": 2, "t_list": [0, 1], "split_scale": 1}
    model = load_original(DD1VAR(), state, config, where="test")
    node = DD1VAR().config_from(shapes_of(state), config)
    assert (node["timesteps"], node["split"], node["flag_layers"]) == ([0, 1], 1, flag_layers)
    back = DD1VAR().finish(DD1VAR().to_theirs(model.state_dict()), node)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert state["pos_1LC"].shape == (1, 15, 32)
    mask = state["attn_bias_for_masking"][0, 0]
    assert (mask[2] == 0).tolist() == [True, True, True, *[False] * 12]
    assert (mask[-1] == 0).nonzero().flatten().tolist() == [*range(6), 14]


def test_a_published_size_needs_no_config() -> None:
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    with torch.device("meta"):
        teacher = NextScale(4096, 1000, [(side, side) for side in sides], 32, dim=1024, layers=16, heads=16)
        shapes = shapes_of(DD1VAR().to_theirs(ScaleStudent(teacher, (0, 5), 5).state_dict()))
        count = sum(parameter.numel() for parameter in ScaleStudent(teacher, (0, 5), 5).parameters())
        plain = NextToken(16384, 1000, grid=(16, 16), dim=768, layers=12, heads=12)
        small = sum(parameter.numel() for parameter in TokenStudent(plain, 8, (0, 80), 80).parameters())
        large = NextToken(16384, 1000, grid=(16, 16), dim=1024, layers=24, heads=16)
        largest = sum(parameter.numel() for parameter in TokenStudent(large, 8, (0, 80), 130).parameters())
    node = DD1VAR().config_from(shapes, {})
    assert (node["timesteps"], node["split"], node["teacher"]["layers"]) == ([0, 5], 5, 16)
    assert [rows for rows, _ in node["teacher"]["grids"]] == list(sides)
    # Published: VAR-d16 327M, LlamaGen-B 98.3M, -L 326M.
    assert (round(count / 1e6), round(small / 1e6, 1), round(largest / 1e6)) == (328, 98.3, 326)


def test_a_trainers_checkpoint_goes_there_and_back(tmp_path: Path) -> None:
    state = scale_state()
    torch.save({"trainer": {"var_wo_ddp": {}, "ema_parameters": state}}, tmp_path / "dd.pth")
    config = {"patch_nums": (1, 2, 3), "t_list": [0, 2], "split_scale": 2}
    report = convert_file(tmp_path / "dd.pth", tmp_path / "model", "dd1_var", config)
    assert report.family == "dd1_var"
    export_original(tmp_path / "model", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_student_of_llamagen_goes_there_and_back() -> None:
    state = token_state()
    assert recognise(state).name == "dd1_llamagen"
    assert {"tok_embeddings.weight", "tok_embeddings.bias", "final_layer_conti.linear.bias", "n_d_embed.weight"} <= set(state)
    family, config = DD1LlamaGen(), {"block_size": 9, "n_head": 2, "t_list": [0, 4], "split_t": 5}
    model = load_original(family, state, config, where="test")
    assert (model.timesteps, model.split) == ((0, 4), 5)
    back = family.to_theirs(model.state_dict())
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    answers = family.answers({"state": model}, {"noise": torch.randn(2, 9, 6), "class_ids": torch.tensor([0, 7])}, config)
    assert (answers["logits"].shape, answers["continuous"].shape) == ((2, 9, 24), (2, 9, 6))
