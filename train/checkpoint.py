"""What a checkpoint holds, and how it gets out of a run and back into one, of any number of ranks and any strategy.

For each network a model folder (`config.json`, `model`, `ema`, `optim`, see `weights.py`), the meters of every rank, and
`state.json`. Everything about a parameter lies there by its name, in float32 and in pieces of its flattened elements (see
`pieces.py`): the same world reads back what it wrote, bit by bit, and any other the same numbers. Nothing is pickled.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from ..errors import UserError
from ..models.build import CONFIG_NAME, EMA, WEIGHTS, check_shapes
from ..models.weights import WeightFiles, part_name, read_weights
from . import store
from .network import Network
from .optim import MOMENTS, moments
from .pieces import Piece, share
from .store import FORMAT, STATE_NAME, Parcel, Saved, Warn
from .strategy import Workers

OPTIM, METERS = "optim", "meters"
Networks = Mapping[str, Network]
Meters = Mapping[str, Tensor]
Run = Callable[[str, int, int], Tensor]
"""Gives elements `[start, start + count)` of a named, flattened tensor."""


class Checkpoints:
    """The checkpoints of a run; every method that writes or restores is called by all ranks.

    Args:
        folder: where they lie.
        workers: the ranks.
        keep: newest ones that stay.
        keep_step: says of a step whether its checkpoint stays for good.
        background: write while training goes on.
    """

    def __init__(
        self,
        folder: Path,
        workers: Workers,
        keep: int = 2,
        keep_step: Callable[[int], bool] = lambda step: False,
        background: bool = True,
    ) -> None:
        self.folder, self.workers, self.background = folder, workers, background
        self._keep, self._keep_step = keep, keep_step
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None

    def save(self, networks: Networks, meters: Meters, state: Mapping[str, Any]) -> float:
        """Copy the run's state to host memory and write it; returns the seconds for which training stood still.

        Raises:
            UserError: this checkpoint or the one before it cannot be written.
        """
        began = time.perf_counter()
        self.wait()
        parcel = _parcel(networks, meters, state, self.workers.rank, self.workers.world)
        self._thread = threading.Thread(target=self._write, args=(int(state["step"]), parcel), daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()
        return time.perf_counter() - began

    def _write(self, step: int, parcel: Parcel) -> None:
        try:
            store.write(self.folder, step, parcel, self.workers.rank, self.workers.world)
            if self.workers.rank == 0:
                store.prune(self.folder, self._keep, self._keep_step)
        except UserError as error:
            self._error = error

    def wait(self) -> None:
        """Until this rank's part of the last checkpoint is written; on rank 0, until it counts.

        Raises:
            UserError: it cannot be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Tell of a checkpoint that could not be written, without waiting for one that is under way.

        Raises:
            UserError: it cannot be written.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def newest(self, warn: Warn) -> Saved | None:
        """See `store.newest`; the ranks share the reading, and agree."""
        return store.newest(self.folder, warn, self._wrong)

    def find(self, path: Path, warn: Warn) -> Saved:
        """See `store.find`; the ranks share the reading, and agree."""
        return store.find(path, warn, self._wrong)

    def _wrong(self, path: Path) -> list[str]:
        found = store.problems(path, self.workers.rank, self.workers.world)
        return found or (["a part of it is damaged"] if self.workers.any(bool(found)) else [])


def _parcel(networks: Networks, meters: Meters, state: Mapping[str, Any], rank: int, world: int) -> Parcel:
    """This rank's part of a checkpoint, as copies."""
    tensors: dict[str, tuple[dict[str, Tensor], dict[str, Size]]] = {}
    texts: dict[str, str] = {}
    for name, network in networks.items():
        pieces = network.engine.pieces if network.engine.sharded else share(network.engine.pieces, rank, world)
        rest = {key: value.detach().cpu().clone() for key, value in network.rest().items()} if rank == 0 else {}
        parts = {WEIGHTS: _weights(network, pieces, network.engine.masters, rest), OPTIM: _optimizer(network, pieces)}
        if network.ema is not None:
            parts[EMA] = _weights(network, pieces, network.ema.shadow, rest)
        tensors |= {f"{name}/{part_name(stem, rank, world)}": part for stem, part in parts.items()}
        if rank == 0:
            content = {"model": dict(network.trainable.node), **(network.trainable.facts or {})}
            texts[f"{name}/{CONFIG_NAME}"] = json.dumps(content, indent=2) + "\n"
    tensors[part_name(METERS, rank, world)] = ({key: value.cpu().clone() for key, value in meters.items()}, {})
    if rank == 0:
        scales = {name: network.scaler.state() for name, network in networks.items() if network.scaler is not None}
        texts[STATE_NAME] = json.dumps({"format": FORMAT, **state, "loss_scale": scales}, indent=1) + "\n"
    return Parcel(tensors, texts)


def _weights(
    network: Network, pieces: list[Piece], held: list[Tensor], rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Size]]:
    found, shapes = dict(rest), {}
    for piece in pieces:
        for name in network.inventory.names[piece.name]:
            found[name + piece.key.removeprefix(piece.name)] = piece.read(held[piece.master]).cpu()
            if not piece.whole:
                shapes[name] = piece.shape
    return found, shapes


def _optimizer(network: Network, pieces: list[Piece]) -> tuple[dict[str, Tensor], dict[str, Size]]:
    found: dict[str, Tensor] = {}
    shapes: dict[str, Size] = {}
    for piece in pieces:
        master = network.engine.masters[piece.master]
        if not network.optimizer.state.get(master):
            continue  # it never had a gradient
        state = moments(network.optimizer, master)
        for moment in MOMENTS:
            found[f"{moment}/{piece.key}"] = piece.read(state[moment]).cpu()
            if not piece.whole:
                shapes[f"{moment}/{piece.name}"] = piece.shape
        if piece.start == 0:
            found[f"step/{piece.name}"] = state["step"].detach().cpu().clone()
    return found, shapes


@torch.no_grad()
def restore(saved: Saved, networks: Networks, workers: Workers) -> dict[str, Tensor]:
    """Put weights, averages, moments and loss scales of a checkpoint back; returns this rank's meters.

    Raises:
        UserError: the checkpoint has other networks, of other shapes, or lacks something.
    """
    _check_networks(saved.path, set(networks))
    for name, network in networks.items():
        _restore_network(network, saved.path / name)
        if network.scaler is not None and name in saved.state.get("loss_scale", {}):
            network.scaler.load(saved.state["loss_scale"][name])
    return _meters(saved, workers)


def _restore_network(network: Network, folder: Path) -> None:
    files = WeightFiles(folder, WEIGHTS)
    load_weights(
        network, {name: kind[0] for name, kind in files.kinds.items()}, files.read_run, where=folder, family=_family(folder)
    )
    engine = network.engine
    if network.ema is not None:
        averages = _files(folder, EMA, network)
        for piece in engine.pieces:
            piece.write(network.ema.shadow[piece.master], averages.read_run(piece.name, piece.start, piece.count))
    optimizer = _files(folder, OPTIM, network)
    network.optimizer.state.clear()
    for piece in engine.pieces:
        if f"step/{piece.name}" not in optimizer.kinds:
            continue
        state = moments(network.optimizer, engine.masters[piece.master])
        for moment in MOMENTS:
            piece.write(state[moment], optimizer.read_run(f"{moment}/{piece.name}", piece.start, piece.count))
        state["step"].copy_(optimizer.read(f"step/{piece.name}"))


def load_weights(network: Network, shapes: Mapping[str, Size], run: Run, *, where: object, family: str) -> None:
    """Put weights in place: the wrapper, the optimizer and the compiled graph hold these very tensors. All ranks call it.

    Args:
        network: what they are put into.
        shapes: of the weights, by name.
        run: gives parts of them.
        where: they come from.
        family: name of the class that they are of.

    Raises:
        UserError: they are another family's, or do not fit.
    """
    own, wanted = network.inventory.shapes, network.inventory.family
    if family != wanted and own.keys() != shapes.keys():
        fix = "take one of the same family, or the config of the run that it comes from"
        raise UserError(f"holds weights of {family}, this run trains {wanted}", where=where, fix=fix)
    check_shapes(own, shapes, wanted, where=where)
    with torch.no_grad():
        for piece in network.engine.pieces:
            piece.write(network.engine.masters[piece.master], run(piece.name, piece.start, piece.count))
        for name, value in network.rest().items():
            value.copy_(run(name, 0, value.numel()).view(value.shape))
    network.engine.publish()


def _meters(saved: Saved, workers: Workers) -> dict[str, Tensor]:
    """What this rank had summed up since the last log; on another number of ranks the first takes it all."""
    parts = sorted(saved.path.glob(f"{METERS}*.safetensors"))
    if saved.state["world"] == workers.world:
        parts = [saved.path / part_name(METERS, workers.rank, workers.world)]
    elif workers.rank != 0:
        parts = []
    found: dict[str, Tensor] = {}
    for part in parts:
        for key, value in read_weights(part).items():
            found[key] = found[key] + value if key in found else value
    return {key: value.to(workers.device) for key, value in found.items()}


def _check_networks(path: Path, wanted: set[str]) -> None:
    found = {config.parent.name for config in path.glob(f"*/{CONFIG_NAME}")}
    fix = "resume with the config of that run, or take its weights alone with init_from"
    for name in sorted(wanted - found):
        raise UserError(f"the checkpoint has no network {name!r}", where=path, fix=fix)
    for name in sorted(found - wanted):
        raise UserError(f"the checkpoint has a network {name!r}, this run has none", where=path, fix=fix)


def _files(folder: Path, stem: str, network: Network) -> WeightFiles:
    if not WeightFiles.exist(folder, stem):
        raise UserError(f"no {stem} tensors for {network.inventory.family}", where=folder,
                        fix="resume with the config of that run")  # fmt: skip
    return WeightFiles(folder, stem)


def _family(folder: Path) -> str:
    """Name of the class that a model folder holds."""
    return str(json.loads((folder / CONFIG_NAME).read_text())["model"]["_target_"]).rpartition(".")[2]
