"""Published parameter lists: `encoder.conv_blocks.{0-4}.res.{0-1}.conv1 x10 (128,128,3,3) (256,128,3,3)`, a line each."""

import itertools
import re
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]


def section(text: str, title: str) -> str:
    """The lines below the heading that starts with `title`."""
    return re.search(rf"^## {title}.*?\n(.*?)(?=^## )", text, re.S | re.M)[1]


def published(table: str, suffixes: Sequence[str] = ("",)) -> dict[str, set[Shape]]:
    """Pattern lines to {name: allowed shapes}; each name with each of the suffixes."""
    names = {}
    for line in table.strip().splitlines():
        pattern, count, *texts = line.split()
        shapes = {tuple(int(size) for size in shape.strip("()").split(",") if size) for shape in texts}
        expanded = _expand(pattern)
        assert f"x{len(expanded)}" == count
        for name, suffix in itertools.product(expanded, suffixes):
            names[name + suffix] = {shape[:1] for shape in shapes} if suffix == ".bias" else shapes
    return names


def _expand(pattern: str) -> list[str]:
    pieces = re.split(r"\{([\d,-]+)\}", pattern)
    options = [[piece] if place % 2 == 0 else _indices(piece) for place, piece in enumerate(pieces)]
    return ["".join(map(str, choice)) for choice in itertools.product(*options)]


def _indices(text: str) -> list[int]:
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [index for end in ends for index in range(end[0], end[-1] + 1)]


def assert_published(theirs: Mapping[str, Shape], expected: Mapping[str, set[Shape]]) -> None:
    """Names are equal, every shape is allowed, and every allowed shape occurs."""
    assert set(theirs) == set(expected)
    assert [(name, shape) for name, shape in theirs.items() if shape not in expected[name]] == []
    assert {shape for shapes in expected.values() for shape in shapes} == set(theirs.values()), "every shape occurs"
