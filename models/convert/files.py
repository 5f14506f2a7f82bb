"""From a published checkpoint to a model folder, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ..build import CONFIG_NAME, build, load_strict, save_model, weight_files
from ..weights import save_weights
from . import families
from .checkpoint import full_precision, read_checkpoint, unwrap
from .family import Family, Node, State, shapes_of


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion found.

    Args:
        family: its name.
        wrapper: the key the weights lay under, `""` when bare.
        node: the `_target_` node of our model, with every size.
        tensors: number of tensors written.
        parameters: number of elements in them.
        dropped: original names without a place in our model.
        folder: the model folder written, if any.
    """

    family: str
    wrapper: str
    node: Node
    tensors: int
    parameters: int
    folder: Path | None
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Published:
    """A published checkpoint in our names.

    Args:
        family: of its weights.
        wrapper: the key they lay under, `""` when bare.
        node: the `_target_` node of our model, with every size.
        weights: ours, in float32.
        dropped: original names without a place in our model.
        where: the file.
    """

    family: Family
    wrapper: str
    node: Node
    weights: State
    dropped: list[str]
    where: Path

    def model(self) -> nn.Module:
        """Our model with these weights, in eval mode.

        Raises:
            UserError: they do not fit it.
        """
        with torch.device("meta"):
            model: nn.Module = build(self.node, trusted=False)
        load_strict(model, self.weights, where=self.where)
        return model.eval()


def read_published(path: Path, family: str | None = None, config: Mapping[str, Any] | None = None) -> Published:
    """Read a published checkpoint.

    Args:
        path: `.safetensors`, `.pt`, `.pth` or `.bin`.
        family: its name; recognised from the keys when not given.
        config: constructor arguments of the original, for what shapes do not tell (e.g. `image_size`).

    Raises:
        UserError: unreadable, or of no known family.
    """
    state, wrapper = unwrap(read_checkpoint(path), where=path, prefer=families.get(family).wrapper if family else "")
    chosen = families.get(family) if family else families.recognise(state, where=path)
    if not chosen.recognise(shapes_of(state)):
        raise UserError(f"is not of the family {chosen.name}", where=path, fix="leave the family out: it is recognised")
    node = chosen.config_from(shapes_of(state), config or {})
    return Published(chosen, wrapper, node, *chosen.to_ours(full_precision(state)), path)


def convert_file(
    path: Path, out: Path | None, family: str | None = None, config: Mapping[str, Any] | None = None
) -> ConvertReport:
    """Read a published checkpoint strictly and write it as a model folder, in float32.

    Args:
        path: see `read_published`.
        out: the folder to write; `None` only says what is there.
        family: see `read_published`.
        config: see `read_published`.

    Raises:
        UserError: unreadable, of no known family, or the weights do not fit it.
    """
    found = read_published(path, family, config)
    found.model()
    name, ours = found.family.name, found.weights
    if out is not None:
        save_model(out, found.node, ours, {"family": name})
    elements = sum(value.numel() for value in ours.values())
    return ConvertReport(name, found.wrapper, found.node, len(ours), elements, out, found.dropped)


def export_original(folder: Path, out_file: Path, family: str | None = None) -> Family:
    """Write a model folder in the original's layout: safetensors, or `{"model": state}` for any other suffix.

    Averaged weights are preferred where there are some, as in `load_model`.

    Args:
        folder: written by `convert_file` or by `tokar export`.
        out_file: `.safetensors`, or `.pt` as the original repositories read it.
        family: needed only where the folder does not say it.

    Raises:
        UserError: the folder is unreadable, or no family is known for it.
    """
    try:
        content = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {CONFIG_NAME}", where=folder, fix="point at an exported model") from error
    name = family or content.get("family")
    if name is None:
        raise UserError("does not say its family", where=folder, fix=f"name it: {', '.join(families.names())}")
    chosen = families.get(name)
    theirs = chosen.to_theirs(weight_files(folder).all())
    theirs = chosen.finish(theirs, content["model"])
    if out_file.is_dir():
        raise UserError("is a folder", where=out_file, fix="give a file to write, e.g. MODEL.safetensors")
    out_file.parent.mkdir(parents=True, exist_ok=True)
    if out_file.suffix == ".safetensors":
        save_weights(theirs, out_file)
    else:
        torch.save({"model": theirs}, out_file)
    return chosen
