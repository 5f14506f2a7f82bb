"""What is saved, where, and how it is read back.

A checkpoint is a folder `checkpoints/step-00001000/` with a model folder for each network (`config.json`,
`model.safetensors`, `ema.safetensors`, `optim.safetensors`), `meters.safetensors`, `state.json`, and the marker `COMPLETE`
with the size and SHA-256 of every file. It is written under a temporary name, the marker last, then renamed: a folder
without a marker does not count. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.build import CONFIG_NAME, EMA_NAME, MARKER, WEIGHTS_NAME, check_fit, read_weights, save_model, save_weights
from .optim import export_state, import_state
from .strategy import Network

FORMAT = 1
STATE_NAME, OPTIM_NAME, METERS_NAME = "state.json", "optim.safetensors", "meters.safetensors"
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.state["step"])


def save(folder: Path, networks: Mapping[str, Network], meters: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `state["step"]` below `folder`; it counts only once it is whole.

    Raises:
        UserError: the disk is full or not writable; nothing half-written counts.
    """
    final = folder / f"step-{state['step']:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for name, network in networks.items():
            _save_network(temporary / name, network)
        save_weights(meters, temporary / METERS_NAME)
        (temporary / STATE_NAME).write_text(json.dumps({"format": FORMAT, **state}, indent=1) + "\n")
        _write_marker(temporary)
        if final.exists():  # the same step again, after a fall back to an older checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the checkpoint cannot be written ({error.strerror or error})",
            where=final,
            fix="free space or permit writing, then start the same command again",
        ) from error
    return final


def _save_network(folder: Path, network: Network) -> None:
    trainable = network.trainable
    save_model(folder, trainable.node, network.module.state_dict(), trainable.facts)
    save_weights(export_state(network.optimizer, network.module), folder / OPTIM_NAME)
    if network.ema is not None:
        save_weights({key: value.clone() for key, value in network.ema.state().items()}, folder / EMA_NAME)


def _write_marker(folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
        _sync(path)
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(directory)
    marker = folder / MARKER
    marker.write_text(json.dumps(files, indent=1) + "\n")
    _sync(marker)
    _sync(folder)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file or a directory's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one clause each; empty when every file has its size and checksum."""
    try:
        files = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        return ["it has no readable COMPLETE marker"]
    found = []
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            found.append(f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}")
        elif _hash(file) != facts["sha256"]:
            found.append(f"{name} has another checksum")
    return found


def listed(folder: Path) -> list[Path]:
    """Checkpoints below `folder` that have a marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))


def newest(folder: Path, warn: Warn) -> Saved | None:
    """The newest sound checkpoint below `folder`, `None` when there is none at all.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    candidates = listed(folder)
    for path in reversed(candidates):
        found = problems(path)
        if not found:
            return open_checkpoint(path)
        warn(f"{path}: {found[0]}; trying the one before it")
    if candidates:
        raise UserError("every checkpoint is damaged", where=folder, fix="restore one, or remove the folder to start afresh")
    return None


def open_checkpoint(path: Path) -> Saved:
    """Read the state of one checkpoint.

    Raises:
        UserError: it is damaged, or was written by a newer version.
    """
    found = problems(path)
    if found:
        raise UserError(f"the checkpoint is damaged: {found[0]}", where=path, fix="use another checkpoint")
    state = json.loads((path / STATE_NAME).read_text())
    if state["format"] > FORMAT:
        raise UserError(f"checkpoint format {state['format']} is newer than {FORMAT}", where=path, fix="update tokar")
    return Saved(path, state)


def find(path: Path, warn: Warn) -> Saved:
    """The checkpoint that `path` (a run folder or a checkpoint) means.

    Raises:
        UserError: there is none.
    """
    if (path / MARKER).exists():
        return open_checkpoint(path)
    saved = newest(path / "checkpoints", warn)
    if saved is None:
        raise UserError("no checkpoint here", where=path, fix="point at a run folder or at checkpoints/step-…")
    return saved


def restore(saved: Saved, networks: Mapping[str, Network]) -> dict[str, Tensor]:
    """Put weights, averages and optimizer states of `saved` back; returns the meters."""
    _check_networks(saved.path, set(networks))
    for name, network in networks.items():
        folder = saved.path / name
        copy_weights(network, read_weights(folder / WEIGHTS_NAME), where=folder, family=_family(folder))
        if network.ema is not None:
            network.ema.load(_tensors(folder / EMA_NAME, network))
        import_state(network.optimizer, network.module, _tensors(folder / OPTIM_NAME, network), where=folder)
    return read_weights(saved.path / METERS_NAME)


def _check_networks(path: Path, wanted: set[str]) -> None:
    found = {config.parent.name for config in path.glob(f"*/{CONFIG_NAME}")}
    fix = "resume with the config of that run, or take its weights alone with init_from"
    for name in sorted(wanted - found):
        raise UserError(f"the checkpoint has no network {name!r}", where=path, fix=fix)
    for name in sorted(found - wanted):
        raise UserError(f"the checkpoint has a network {name!r}, this run has none", where=path, fix=fix)


def _tensors(path: Path, network: Network) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"no {path.name} for {network.trainable.module.__class__.__name__}", where=path.parent,
                        fix="resume with the config of that run")  # fmt: skip
    return read_weights(path)


def _family(folder: Path) -> str:
    """Name of the class that a model folder holds."""
    return str(json.loads((folder / CONFIG_NAME).read_text())["model"]["_target_"]).rpartition(".")[2]


@torch.no_grad()
def copy_weights(network: Network, weights: Mapping[str, Tensor], *, where: object, family: str) -> None:
    """Copy weights in place: the wrapper, the optimizer and the compiled graph hold these very tensors.

    Args:
        network: what they are copied into.
        weights: by name.
        where: they come from.
        family: name of the class that they are of.

    Raises:
        UserError: they are another family's, or do not fit.
    """
    own, wanted = network.module.state_dict(), type(network.module).__name__
    if family != wanted and own.keys() != weights.keys():
        fix = "take one of the same family, or the config of the run that it comes from"
        raise UserError(f"holds weights of {family}, this run trains {wanted}", where=where, fix=fix)
    check_fit(network.module, weights, where=where)
    for key, value in own.items():
        value.copy_(weights[key])


def prune(folder: Path, keep: int, keep_step: Callable[[int], bool]) -> None:
    """Remove all but the newest `keep` checkpoints and those whose step `keep_step` wants; sweep up unfinished ones."""
    for path in listed(folder)[:-keep]:
        if not keep_step(int(path.name.removeprefix("step-"))):
            (path / MARKER).unlink()  # first: a half-removed checkpoint must not count
            shutil.rmtree(path)


def sweep_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*"):
        if path.is_dir() and not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)
