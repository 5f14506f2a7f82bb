"""`tokar encode`: images to code shards, by one process or by several at once."""

from __future__ import annotations

VIEWS = {"one": 1, "flip": 2, "ten-crop": 10}
