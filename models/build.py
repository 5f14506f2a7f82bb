"""From a config node to an object, and from a model folder to a model.

A node is a mapping with `_target_: tokar.package.module.Name` and the keyword arguments of that callable;
nodes may nest. A model folder holds `config.json` (such a node) and `model.safetensors`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError

CONFIG_NAME, WEIGHTS_NAME, EMA_NAME = "config.json", "model.safetensors", "ema.safetensors"
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
    save_weights({name: tensor.detach().clone() for name, tensor in weights.items()}, folder / WEIGHTS_NAME)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, no two of which share memory, as safetensors.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
    except SafetensorError as error:  # it hides what the system said in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_model(folder: Path, *, ema: bool = True, device: str | torch.device = "cpu", trusted: bool = False) -> nn.Module:
    """Read a model folder, strictly, in eval mode.

    Args:
        folder: holds `config.json` and `model.safetensors` (and perhaps `ema.safetensors`).
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
    file = _weights_file(folder, ema)
    load_strict(model, read_weights(file), where=file)
    return model.to(device).eval()


def _weights_file(folder: Path, ema: bool) -> Path:
    """The weights of a model folder; in a checkpoint they must be those that its marker records.

    Raises:
        UserError: they changed after they were written.
    """
    file = folder / (EMA_NAME if ema and (folder / EMA_NAME).exists() else WEIGHTS_NAME)
    marker = folder.parent / MARKER
    if marker.is_file() and file.is_file():
        recorded = _read_json(marker).get(f"{folder.name}/{file.name}", {}).get("sha256")
        with file.open("rb") as content:
            if recorded not in (None, hashlib.file_digest(content, "sha256").hexdigest()):
                raise UserError("changed after it was written", where=file, fix="point at another checkpoint of the run")
    return file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("the checkpoint is damaged", where=path, fix="point at another checkpoint of the run") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name.

    Raises:
        UserError: missing, truncated or not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be read ({error})", where=path, fix="the file is missing or broken: export or copy it again"
        ) from error


def load_strict(model: nn.Module, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Load weights in which every key and shape must fit; the model may live on the meta device.

    Raises:
        UserError: see `check_fit`.
    """
    check_fit(model, weights, where=where)
    model.load_state_dict(dict(weights), assign=True)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Every key and shape of `weights` must be the model's.

    Raises:
        UserError: names the first missing, unexpected or misshapen keys.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    problems += [f"{name} is {given[name]}, not {own[name]}" for name in own if name in given and own[name] != given[name]]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"weights do not fit {type(model).__name__}: {', '.join(problems[:4])}{more}",
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

    Args:
        source: a run, a checkpoint or a model folder.
        out: the folder to write.
        ema: take the averaged weights where there are some.

    Raises:
        UserError: there is no model, or its weights cannot be read.
    """
    folder = locate_model(source)
    node = json.loads((folder / CONFIG_NAME).read_text())["model"]
    save_model(out, node, read_weights(_weights_file(folder, ema)), model_facts(folder))
    return out


def model_facts(folder: Path) -> dict[str, Any]:
    """What lies in `config.json` beside the model's node: layout, classes, …"""
    content = json.loads((folder / CONFIG_NAME).read_text())
    return {key: value for key, value in content.items() if key != "model"}


def model_node(folder: Path) -> dict[str, Any]:
    """The node of the model in a model folder."""
    return dict(json.loads((folder / CONFIG_NAME).read_text())["model"])
