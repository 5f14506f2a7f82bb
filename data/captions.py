"""Captions of images: the `.txt` members of their tars."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from .shards import ImageDataset
from .tars import CAPTION_EXTENSION, Member, scan, split_name


class Captions:
    """The caption of every image of a data set, by number.

    Args:
        images: of WebDataset tars with a `.txt` beside each image.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def read(self, i: int) -> str:
        """The caption of image `i`.

        Raises:
            UserError: it has none.
        """
        tar, key = self.images.tar(i), self.images.key(i)
        member = _texts(tar).get(key)
        if member is None:
            raise UserError(
                f"{key!r} has no .txt", where=tar, fix="give tars with a caption beside each image, or leave out text"
            )
        with open(tar, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size).decode("utf-8", "replace").strip()


@lru_cache(maxsize=2)  # images are read in order, so one tar after the other
def _texts(tar: str) -> dict[str, Member]:
    members = ((split_name(member.name), member) for member in scan(Path(tar)))
    return {key: member for (key, extension), member in members if extension == CAPTION_EXTENSION}
