"""Which elements of which parameter a rank holds: the one form in which checkpoints know weights, moments and averages.

A *master* is a tensor that the optimizer updates on this rank: a parameter, a shard of one, or a flat row of shards of many.
A *piece* is a run of elements of one flattened parameter inside a master, so what is saved does not depend on the strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + count)` of a flattened parameter.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        start: first element.
        count: number of elements.
        master: index of the master that holds them.
        offset: where they begin in the flattened master.
    """

    name: str
    shape: torch.Size
    start: int
    count: int
    master: int
    offset: int = 0

    @property
    def whole(self) -> bool:
        """It is the whole parameter."""
        return self.count == self.shape.numel()

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name if self.whole else f"{self.name}@{self.start}"

    def read(self, tensor: Tensor) -> Tensor:
        """A copy of these elements of a tensor laid out like the master, in the parameter's shape if they are all of it."""
        if tensor.shape == self.shape:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        run = tensor.detach().reshape(-1)[self.offset : self.offset + self.count].clone()
        return run.view(self.shape) if self.whole else run

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Put elements back, whatever the memory format of `tensor`, which a fused optimizer walks as raw memory."""
        if tensor.shape == self.shape:
            tensor.copy_(values.view(self.shape))
        else:
            tensor.view(-1)[self.offset : self.offset + self.count].copy_(values.reshape(-1))


def whole_pieces(module: nn.Module) -> list[Piece]:
    """Every trained parameter as one piece, masters in the order of the parameters."""
    named = trained(module)
    return [Piece(name, value.shape, 0, value.numel(), index) for index, (name, value) in enumerate(named)]


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are optimised."""
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


def share(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """The part of pieces that every rank holds which this one writes: equal numbers of elements, as far as tensors allow."""
    total, before = sum(piece.count for piece in pieces), 0
    mine = []
    for piece in pieces:
        middle, before = before + piece.count / 2, before + piece.count
        if int(middle * world / max(total, 1)) == rank:
            mine.append(piece)
    return mine


@dataclass(frozen=True)
class Inventory:
    """What a network consists of before a strategy takes it apart.

    Args:
        family: name of its class.
        shapes: of everything in its state, by name.
        names: all names of each trained parameter by its first one: tied weights have several.
    """

    family: str
    shapes: Mapping[str, torch.Size]
    names: Mapping[str, Sequence[str]]


def take_stock(module: nn.Module) -> Inventory:
    """The inventory of a plain network."""
    first = {id(value): name for name, value in trained(module)}
    names: dict[str, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if id(value) in first:
            names.setdefault(first[id(value)], []).append(name)
    return Inventory(type(module).__name__, {name: value.shape for name, value in module.state_dict().items()}, names)
