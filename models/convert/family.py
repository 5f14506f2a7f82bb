"""What a published model family must say about itself so that its weights can be read, written and checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Node = dict[str, Any]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


class Family(ABC):
    """One published family: its key names, its sizes, and our model of it.

    Attributes:
        name: what users write, e.g. `llamagen_vq`.
        parts: the groups of tensors (`state.*`, `vqvae.*`, …) that a parity file of this family holds.
        wrapper: where its weights lie in a checkpoint that holds those of other networks too, `""`: nowhere special.
    """

    name: str
    parts: tuple[str, ...] = ("state",)
    wrapper: str = ""

    @abstractmethod
    def recognise(self, shapes: Shapes) -> bool:
        """Whether a state dict with these names and shapes (wrappers already removed) belongs to this family."""

    @abstractmethod
    def config_from(self, shapes: Shapes, config: Mapping[str, Any]) -> Node:
        """The `_target_` node of our model.

        Args:
            shapes: of the original state; sizes that `config` does not give are read from them.
            config: constructor arguments of the original under its own names, perhaps none.

        Raises:
            UserError: the two contradict each other.
        """

    @abstractmethod
    def to_ours(self, state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
        """Our state dict, and the names of the originals that have no place in it."""

    @abstractmethod
    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """The original's state dict, complete, from ours."""

    def finish(self, theirs: State, node: Node) -> State:
        """The original's state dict with what follows from the sizes alone: buffers that its strict loading asks for."""
        return theirs

    @abstractmethod
    def answers(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Our value for every `out.*` of a parity file.

        Args:
            models: our model by part name (`state`, or one for each of `parts`), loaded, in eval mode.
            inputs: the tensors under `in.*`, without the prefix.
            config: the file's config.
        """
