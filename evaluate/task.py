"""One evaluation by `tokar evaluate`: how many images, how they are walked through, what is drawn beside the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conf.protocols import Protocol
from ..conf.schema import Evaluate
from ..errors import UserError
from ..models.open import OpenedGenerator
from .protocol import content_id
from .ranks import Pace
from .reference import captions_of, split_images
from .samples import Texts, text_encoder
from .setting import Setting


@dataclass(frozen=True)
class Evaluation(Setting):
    """What is measured, against what, where.

    Args:
        folder: of results; below it lies what an interrupted evaluation has; `None`: nothing is kept.
        pictures: drawn beside the result, by name.
        states: folders of what went into the result.
    """

    config: Evaluate
    folder: Path | None = None
    pictures: dict[str, Callable[[Path], Path]] = field(default_factory=dict)
    states: list[Path] = field(default_factory=list)

    def texts(self, opened: OpenedGenerator, split: str, count: int) -> Texts:
        """The captions of a split as conditions of a generator."""
        return Texts(text_encoder(opened, self.config.text_encoder, self.device), captions_of(self.data, split, count))

    def count(self, protocol: Protocol, available: int | None) -> int:
        """How many images the protocol looks at.

        Args:
            protocol: asks for so many; one without a number takes what there is, or as many as the reference split has.
            available: images of the target, or `None` where they are drawn.
        """
        if protocol.count is None:
            return available or split_images(self.data, self.reference_split)[1]
        if available is None or protocol.count <= available:
            return protocol.count
        if self.config.protocol is None:
            return available
        fix = f"give more images, or set count={available}, which the result then says"
        raise UserError(f"{available} images, protocol {protocol.name} wants {protocol.count}", where=self.target, fix=fix)

    def pace(self, identity: Mapping[str, Any], advance: Callable[[int], None]) -> Pace:
        """How images are walked through; what an evaluation of the same content has is found by the hash of `identity`."""
        if self.folder is not None:
            self.states.append(self.folder / "unfinished" / content_id(identity, digits=16))
        folder = self.states[-1] if self.states else None
        return Pace(self.config.batch_size, self.config.save_every, folder, advance)
