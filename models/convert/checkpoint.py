"""Published checkpoint files: reading them safely and taking their wrappers off."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..weights import read_weights

WRAPPERS = ("ema", "model", "module", "state_dict", "trainer", "vae_local", "var_wo_ddp")
_PREFIXES = ("module.", "_orig_mod.")
_DOTTED = ("vae_local", "var_wo_ddp")  # VAR's trainer, flattened: its tokenizer beside its generator


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a `.safetensors` or torch file holds; nothing but tensors and plain values is ever unpickled.

    Raises:
        UserError: missing, broken, or holding objects that could run code.
    """
    if not path.is_file():
        raise UserError("no such file", where=path, fix="give the path of a checkpoint file")
    if path.suffix == ".safetensors":
        return dict(read_weights(path))
    try:
        # LlamaGen and GigaTok keep their command line beside the weights: plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a file of garbage makes the unpickler fail in any way
        raise _refusal(path, error) from error
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not a state dict", where=path, fix="give a checkpoint file")
    return dict(content)


def _refusal(path: Path, error: Exception) -> UserError:
    if found := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
        return UserError(
            f"holds {found[1]}, an object that could run code when read",
            where=path,
            fix="save its state dict alone, best as safetensors",
        )
    return UserError("is not a checkpoint, or is broken", where=path, fix="copy it again, or save it as safetensors")


def unwrap(checkpoint: Mapping[str, Any], *, where: object = None, prefer: str = "") -> tuple[dict[str, Tensor], str]:
    """The bare state dict, and the wrapper key it lay under (`""` when raw).

    The key `prefer` comes first, then averaged weights (`ema`), then `model`, `module`, `state_dict`; of VAR's trainer
    checkpoints its tokenizer (`trainer.vae_local`). `module.` and `_orig_mod.`, which data-parallel wrappers and
    `torch.compile` leave in names, are removed.

    Raises:
        UserError: no tensors in it, or two names fall together.
    """
    path: list[str] = []
    inner: Mapping[str, Any] = checkpoint
    while key := next((name for name in (prefer, *WRAPPERS) if isinstance(inner.get(name), Mapping) and inner[name]), None):
        path.append(key)
        inner = inner[key]
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError("holds no weights", where=where, fix=f"expected tensors, bare or under one of {', '.join(WRAPPERS)}")
    for prefix in (f"trainer.{name}." for name in (prefer, *_DOTTED)):
        if below := {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}:
            tensors, path = below, [prefix.rstrip(".")]
    state = {_bare(name): value for name, value in tensors.items()}
    if len(state) != len(tensors):
        raise UserError("two names are equal once wrapper prefixes are removed", where=where, fix="save one state dict alone")
    return state, ".".join(path)


def full_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating point tensors as float32, exactly; others as they are."""
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name.replace("._orig_mod.", ".")  # a sub-module compiled on its own
