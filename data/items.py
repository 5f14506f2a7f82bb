"""What every source of images offers: items by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceItem:
    """One image of a source.

    Args:
        key: unique name, the WebDataset key.
        label: class index, `None` when `problem` says why there is none, or in a source of captions without classes.
        read: gives the file's bytes; raises `BadImageError` if they cannot be read.
        problem: why the item cannot be used, known before reading it; empty for a usable one.
        caption: gives the bytes of the text beside the image, like `read`; `None`: there is none.
    """

    key: str
    label: int | None
    read: Callable[[], bytes]
    problem: str = ""
    caption: Callable[[], bytes] | None = None


class Source(ABC):
    """One split of a data set, in a fixed order.

    Args:
        spec: what the user wrote.
        classes: class names, sorted; a label is an index into them.
        by_class: items of a class lie together, so a preparation should mix them.
    """

    def __init__(self, spec: str, classes: list[str], by_class: bool) -> None:
        self.spec, self.classes, self.by_class = spec, classes, by_class

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, i: int) -> SourceItem:
        """The i-th item; cheap, reads no image."""
