"""What checkpoints with the names of taming-transformers share (VAR's tokenizer, IBQ, Open-MAGVIT2)."""

from __future__ import annotations

import re
from typing import Any

from ...errors import UserError
from .cnn import Renames, any_starts, mirror, swap
from .family import Shapes

# Theirs, ours, as pairs that `cnn.swap` reads in either direction; `#` stands for a number.
NAMES: Renames = (
    ("encoder.down.#.block.#.", "encoder.levels.#.blocks.#."),
    ("encoder.down.#.attn.#.", "encoder.levels.#.attentions.#."),
    ("encoder.down.#.downsample.", "encoder.levels.#.resample."),
    ("decoder.up.#.block.#.", "decoder.levels.#.blocks.#."),
    ("decoder.up.#.attn.#.", "decoder.levels.#.attentions.#."),
    ("decoder.up.#.upsample.", "decoder.levels.#.resample."),
    (".mid.block_1.", ".middle.0."),
    (".mid.attn_1.", ".middle.1."),
    (".mid.block_2.", ".middle.2."),
    (".nin_shortcut.", ".shortcut."),
    (".proj_out.", ".out."),
)
_MIRRORED = ("decoder.levels.", "decoder.adaptive.")
BLOCKS = ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
"""Names that every such checkpoint has."""


def to_ours(name: str, names: Renames, levels: int) -> str:
    """Their decoder counts its `levels` from the finest, ours in the order they run."""
    return _mirror(swap(name, names), levels)


def to_theirs(name: str, names: Renames, levels: int) -> str:
    """The inverse of `to_ours`."""
    return swap(_mirror(name, levels), [(ours, theirs) for theirs, ours in names])


def _mirror(name: str, levels: int) -> str:
    for stem in _MIRRORED:
        name = mirror(name, stem, levels)
    return name


def read_half(shapes: Shapes, stem: str) -> dict[str, Any]:
    """Constructor arguments of our encoder or decoder from the shapes of theirs (`encoder.down` or `decoder.up`)."""
    half = stem.partition(".")[0]
    widths: dict[int, int] = {}
    blocks = 0
    for name, size in shapes.items():
        if found := re.fullmatch(rf"{re.escape(stem)}\.(\d+)\.block\.(\d+)\.conv1\.weight", name):
            widths[int(found[1])] = size[0]
            blocks = max(blocks, int(found[2]) + 1)
    width = shape(shapes, "encoder.conv_in.weight")[0]
    z_channels = (
        shape(shapes, "encoder.conv_out.weight")[0] if half == "encoder" else shape(shapes, "decoder.conv_in.weight")[1]
    )
    return {
        "width": width,
        "multipliers": [widths[level] // width for level in sorted(widths)],
        "blocks": blocks,
        "z_channels": z_channels,
        "attention": any_starts(shapes, (f"{half}.mid.attn_1.",)),
    }


def shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there.

    Raises:
        UserError: it is not.
    """
    if name not in shapes:
        raise UserError(f"missing {name}", fix="the file is incomplete: copy it again")
    return shapes[name]
