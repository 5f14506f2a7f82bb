"""The families that can be converted, and how a state dict finds its own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping

from torch import Tensor

from ...errors import UserError, nearest
from .family import Family, shapes_of

# A family is one class in its own module, imported when first asked for.
_FAMILIES = {
    "llamagen_vq": "llamagen.LlamaGenVQ",
    "llamagen_gpt": "llamagen_gpt.LlamaGenGPT",
}


def names() -> list[str]:
    """Every family's name."""
    return list(_FAMILIES)


@functools.cache
def get(name: str) -> Family:
    """The family of this name.

    Raises:
        UserError: there is none.
    """
    if name not in _FAMILIES:
        raise UserError(f"no family {name!r}", fix=nearest(name, _FAMILIES))
    module, _, attribute = _FAMILIES[name].rpartition(".")
    family: Family = getattr(importlib.import_module(f".{module}", __package__), attribute)()
    return family


def recognise(state: Mapping[str, Tensor], *, where: object = None) -> Family:
    """The family whose key names these are.

    Args:
        state: without wrappers and prefixes (see `checkpoint.unwrap`).
        where: the file, for the error.

    Raises:
        UserError: none claims it.
    """
    shapes = shapes_of(state)
    for name in _FAMILIES:
        if get(name).recognise(shapes):
            return get(name)
    first = ", ".join(list(shapes)[:3]) or "no tensors"
    raise UserError(f"weights of no known family ({first}, …)", where=where, fix=f"known families: {', '.join(_FAMILIES)}")
