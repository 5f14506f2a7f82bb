"""From a config node to an object, and from a model folder to a model.

A node is a mapping with `_target_: tokar.package.module.Name` and the keyword arguments of that callable;
nodes may nest. A model folder holds `config.json` (such a node) and `model.safetensors`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .weights import WeightFiles, part_name, save_weights, write_streamed

CONFIG_NAME, WEIGHTS, EMA = "config.json", "model", "ema"
"""In a model folder: the config node, and the stems of the weights and of their average (see `weights.py`)."""
MARKER = "COMPLETE"
"""Written last into a checkpoint: size and SHA-256 of every file in it."""


def build(node: Any, *, trusted: bool = True) -> Any:
    """Build the object that a config node describes.

    Args:
        node: a mapping with `_target_`, or any plain value (returned as it is; lists and mappings are walked).
        trusted: the node comes from the user's own config. When false only targets inside `tokar` are called, so that
            a downloaded `config.json` cannot run other code.

    Raises:
        UserError: the target does not exist, is not allowed, or refuses its arguments.
    """
    if isinstance(node, Mapping):
        values = {key: build(value, trusted=trusted) for key, value in node.items() if key != "_target_"}
        if "_target_" not in node:
            return values
        target = resolve_target(str(node["_target_"]), trusted)
        try:
            return target(**values)
        except (TypeError, ValueError) as error:
            fix = "" if "; " in str(error) else "correct the arguments of this node"  # ours say what to do themselves
            raise UserError(str(error), where=node["_target_"], fix=fix) from error
    if isinstance(node, list | tuple):
        return [build(value, trusted=trusted) for value in node]
    return node


def resolve_target(path: str, trusted: bool = True) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        UserError: there is none, or it lies outside tokar and the node is not trusted.
    """
    module_name, _, name = path.rpartition(".")
    if not trusted and not module_name.startswith("tokar."):
        raise UserError(
            "a model folder may only name classes of tokar", where=path, fix="build this model from your own config instead"
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("no such class", where=path, fix="check the _target_") from error


def save_model(
    folder: Path, node: Mapping[str, Any], weights: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder: `config.json` with the node (and `extra` facts beside it) and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": dict(node), **(extra or {})}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n")
    save_weights({name: tensor.detach().clone() for name, tensor in weights.items()}, folder / part_name(WEIGHTS, 0, 1))


def load_model(folder: Path, *, ema: bool = True, device: str | torch.device = "cpu", trusted: bool = False) -> nn.Module:
    """Read a model folder, strictly, in eval mode.

    Args:
        folder: holds `config.json` and the weights, perhaps also their average.
        ema: prefer the averaged weights where there are some.
        device: where the weights go.
        trusted: see `build`.

    Raises:
        UserError: a file is missing or broken, or the weights do not fit the config.
    """
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
        node = content["model"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no readable {CONFIG_NAME}", where=folder, fix="point at a run, a checkpoint or an exported model"
        ) from error
    with torch.device("meta"):
        model = build(node, trusted=trusted)
    files = weight_files(folder, ema)
    load_strict(model, files.all(), where=folder)
    return model.to(device).eval()


def weight_files(folder: Path, ema: bool = True) -> WeightFiles:
    """The weights of a model folder; in a checkpoint they must be those that its marker records.

    Args:
        folder: of the model.
        ema: prefer the averaged weights where there are some.

    Raises:
        UserError: they changed after they were written.
    """
    files = WeightFiles(folder, EMA if ema and WeightFiles.exist(folder, EMA) else WEIGHTS)
    marker = folder.parent / MARKER
    recorded = _read_json(marker) if marker.is_file() else {}
    for file in files.paths:
        known = recorded.get(f"{folder.name}/{file.name}", {}).get("sha256")
        if known is not None and file.is_file() and known != _digest(file):
            raise UserError("changed after it was written", where=file, fix="point at another checkpoint of the run")
    return files


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("the checkpoint is damaged", where=path, fix="point at another checkpoint of the run") from error


def load_strict(model: nn.Module, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Load weights in which every key and shape must fit; the model may live on the meta device.

    Raises:
        UserError: see `check_shapes`.
    """
    check_shapes(shapes_of(model.state_dict()), shapes_of(weights), type(model).__name__, where=where)
    model.load_state_dict(dict(weights), assign=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes by name."""
    return {name: value.shape for name, value in tensors.items()}


def check_shapes(own: Mapping[str, torch.Size], given: Mapping[str, torch.Size], family: str, *, where: object) -> None:
    """Every key and shape of `given` must be the model's `own`.

    Raises:
        UserError: names the first missing, unexpected or misshapen keys.
    """
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    common = [name for name in own if name in given and own[name] != given[name]]
    problems += [f"{name} is {tuple(given[name])}, not {tuple(own[name])}" for name in common]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"weights do not fit {family}: {', '.join(problems[:4])}{more}",
            where=where,
            fix="use the config these weights were trained with",
        )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's state: tells whose codes these are."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pick_device(accelerator: str) -> torch.device:
    """`cpu`, `cuda`, or with `auto` the GPU where there is one.

    Raises:
        UserError: a GPU is asked for and none is visible.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible", where="strategy.accelerator=cuda", fix="set strategy.accelerator=auto or cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def locate_model(path: Path, name: str | None = None) -> Path:
    """The model folder that `path` means: itself, or the main network of a checkpoint or of a run's newest one.

    Args:
        path: an exported model, a checkpoint, or a run folder.
        name: a network of the checkpoint other than the main one.

    Raises:
        UserError: there is no model here.
    """
    if (path / CONFIG_NAME).is_file():
        return path
    complete = [marker.parent for marker in sorted(path.glob(f"checkpoints/step-*/{MARKER}"))]
    checkpoint = path if (path / MARKER).is_file() else complete[-1] if complete else None
    if checkpoint is None:
        what = "no model here" if path.exists() else "no such file or folder"
        raise UserError(what, where=path, fix="point at a run with a checkpoint, or at an exported model")
    return checkpoint / (name or str(_read_json(checkpoint / "state.json").get("main")))


def export_model(source: Path, out: Path, *, ema: bool = True) -> Path:
    """Write the model that `source` means (see `locate_model`) as a model folder; no code named in it is run.

    The weights become one file whatever the ranks that wrote them; they pass through memory one tensor at a time.

    Args:
        source: a run, a checkpoint or a model folder.
        out: the folder to write.
        ema: take the averaged weights where there are some.

    Raises:
        UserError: there is no model, or its weights cannot be read.
    """
    folder = locate_model(source)
    files = weight_files(folder, ema)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text())
    write_streamed(files.kinds, files.read, out / part_name(WEIGHTS, 0, 1))
    return out


def model_facts(folder: Path) -> dict[str, Any]:
    """What lies in `config.json` beside the model's node: layout, classes, …"""
    content = json.loads((folder / CONFIG_NAME).read_text())
    return {key: value for key, value in content.items() if key != "model"}


def model_node(folder: Path) -> dict[str, Any]:
    """The node of the model in a model folder."""
    return dict(json.loads((folder / CONFIG_NAME).read_text())["model"])
