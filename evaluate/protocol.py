"""Results: numbers that never travel without the protocol that made them. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.files import digest_of, os_errors, sha256, whole_file
from ..errors import UserError

SECONDS = "seconds_per_image"
"""What the `speed` of a result calls the time for an image."""
RECORDED_PACKAGES = ("tokar", "torch", "numpy", "pillow", "transformers")


def versions() -> dict[str, str]:
    """Installed versions of what touches the numbers."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def content_id(value: Mapping[str, Any], digits: int = 8) -> str:
    """A short hash of a plain mapping: equal whenever the content is, whatever the order of its keys."""
    return digest_of(dict(value))[:digits]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        UserError: the file cannot be read.
    """
    with os_errors(path):
        return sha256(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it, so that a reader sees the old content or the new one, never a part.

    Raises:
        UserError: the place cannot be written.
    """
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)


@dataclass(frozen=True)
class Result:
    """Numbers, how they were measured, and of what.

    Args:
        name: the kind of evaluation, e.g. `"reconstruction"`, `"generation"`; one table in the report for each.
        numbers: metric name to value.
        protocol: everything that makes two numbers comparable (features and their weights, crop, resize, rounding, reference,
            count). Two results may stand in one column only when it is equal.
        subject: what was measured: run, checkpoint, weights, guidance, seeds of the samples.
        environment: versions of the packages; not part of the protocol's id.
        speed: how long drawing an image took, and on what (see `speed.Speed.told`); no part of it either, since it differs
            with the machine, the batch and the hour.
    """

    name: str
    numbers: Mapping[str, float]
    protocol: Mapping[str, Any]
    subject: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=versions)
    speed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol_id(self) -> str:
        """Eight hex digits that differ when the protocol does."""
        return content_id(self.protocol)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; a number that is not finite becomes null."""
        return {
            "name": self.name,
            "numbers": {key: float(value) if math.isfinite(value) else None for key, value in self.numbers.items()},
            "protocol_id": self.protocol_id,
            "protocol": dict(self.protocol),
            "subject": dict(self.subject),
            "environment": dict(self.environment),
            **({"speed": dict(self.speed)} if self.speed else {}),
        }

    def save(self, path: Path) -> Path:
        """Write the JSON form, atomically."""
        write_whole(path, (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """The inverse of `save`.

        Raises:
            UserError: no result file, or its protocol was changed after it was written.
        """
        try:
            values = json.loads(path.read_text())
            numbers = {key: math.nan if value is None else float(value) for key, value in values["numbers"].items()}
            told = (values["protocol"], values["subject"], values["environment"], values.get("speed", {}))
            result = cls(values["name"], numbers, *told)
            stated = values["protocol_id"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError("no readable result", where=path, fix="remove the file or evaluate again") from error
        if stated != result.protocol_id:
            raise UserError("the protocol does not match its id", where=path, fix="evaluate again instead of editing the file")
        return result
