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
    "dd1_llamagen": "dd1.DD1LlamaGen",  # the students before their teachers, whose names they have too
    "dd1_var": "dd1.DD1VAR",
    "gigatok_gpt": "gigatok_gpt.GigaTokGPT",  # before LlamaGen's, whose names it has too
    "llamagen_gpt": "llamagen_gpt.LlamaGenGPT",
    "d_ar": "llamagen_gpt.DARGPT",  # after it: only by name, its tensors are the same
    "gigatok_1d": "gigatok.GigaTok1D",
    "gigatok_2d": "gigatok.GigaTok2D",
    "var_vqvae": "var.VARVQVAE",
    "var": "var_gpt.VARGPT",
    "rar": "rar.RARGenerator",
    "open_magvit2": "seed_voken.OpenMAGVIT2",
    "ibq": "seed_voken.IBQTokenizer",
    "titok": "titok.TiTok",
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


def find(state: Mapping[str, Tensor]) -> Family | None:
    """The family whose key names these are, if any; `state` without wrappers and prefixes (see `checkpoint.unwrap`)."""
    shapes = shapes_of(state)
    return next((get(name) for name in _FAMILIES if get(name).recognise(shapes)), None)


def recognise(state: Mapping[str, Tensor], *, where: object = None) -> Family:
    """The family whose key names these are.

    Args:
        state: without wrappers and prefixes (see `checkpoint.unwrap`).
        where: the file, for the error.

    Raises:
        UserError: none claims it.
    """
    if family := find(state):
        return family
    first = ", ".join(list(state)[:3]) or "no tensors"
    raise UserError(f"weights of no known family ({first}, …)", where=where, fix=f"known families: {', '.join(_FAMILIES)}")
