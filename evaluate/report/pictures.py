"""Sample and reconstruction grids as data URIs: the page carries its pictures with it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .runs import Run

MOST_STEPS = 24
LARGE_BYTES = 400_000
ABOUT = "about"
"""Key of the text in a PNG in which a picture tells of itself: `columns` (what is above each), `note`; JSON."""
STEP_NAME = re.compile(r"step-(\d+)-(.+)")


def series(run: Run) -> dict[str, list[tuple[str, Path]]]:
    """Pictures by what they show, each with its step as text (empty for a picture without one), oldest first."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in run.pictures:
        match = STEP_NAME.fullmatch(path.stem)
        step, name = (str(int(match[1])), match[2]) if match else ("", path.stem)
        found.setdefault(name.replace("_", " "), []).append((step, path))
    for name, pictures in found.items():
        found[name] = evenly(sorted(pictures, key=lambda item: int(item[0] or 0)), MOST_STEPS)
    return found


def evenly(items: Sequence[tuple[str, Path]], most: int) -> list[tuple[str, Path]]:
    """At most `most` items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def embed(path: Path) -> tuple[str, tuple[int, int], dict[str, Any]]:
    """A data URI, the size in pixels, and what the picture tells of itself; a large picture becomes a JPEG.

    Raises:
        OSError: no readable image.
    """
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        size, told = image.size, _told(image.info.get(ABOUT))
        if len(content) <= LARGE_BYTES:
            return uri("png", content), size, told
        flat = Image.new("RGB", size, (128, 128, 128))
        flat.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
    buffer = io.BytesIO()
    flat.save(buffer, format="JPEG", quality=92)
    return uri("jpeg", buffer.getvalue()), size, told


def _told(text: Any) -> dict[str, Any]:
    try:
        told = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def uri(kind: str, content: bytes) -> str:
    """The bytes of an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
