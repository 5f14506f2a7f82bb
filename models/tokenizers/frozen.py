"""Frozen networks that losses look through: held beside the module that uses them, read from transformers' folders.

Shapes: `B` batch, `H`, `W` height and width. Images are `[B, 3, H, W]` in [-1, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of pixels in [0, 1]."""
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""The same, of CLIP's own training images."""
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Pixels in [-1, 1] stay as they are."""

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


class UsesFrozen(nn.Module):
    """A module with a frozen network that moves with it and is otherwise no part of it.

    The network is in no parameter list (no optimizer, sharding or `requires_grad_` finds it), in no state dict, and always in
    eval mode. Gradients pass through it to its input.

    Args:
        network: frozen in place.
        statistics: mean and standard deviation of its input, of pixels in [0, 1].
    """

    def __init__(self, network: nn.Module, statistics: Statistics) -> None:
        super().__init__()
        self._aside = (network.eval().requires_grad_(False),)  # a tuple: nn.Module does not look into it
        self._statistics = statistics

    @property
    def frozen(self) -> Any:
        """The frozen network."""
        return self._aside[0]

    def normalise(self, image: Tensor) -> Tensor:
        """Images in [-1, 1] in the frozen network's own units and precision."""
        mean, std = (image.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in self._statistics)
        return (((image.float() + 1) / 2 - mean) / std).to(next(self.frozen.parameters()).dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UsesFrozen:
        """What `to`, `cuda`, `float`, … call: the frozen network goes along."""
        self.frozen._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def load_frozen(path: str, kinds: dict[str, str], name: str) -> Any:
    """A module of transformers, float32, every weight of it from the file.

    Args:
        path: a folder on disk, or the id of a model on the Hugging Face hub, which is downloaded once.
        kinds: class of transformers by the `model_type` that the folder's `config.json` may state.
        name: what errors call it.

    Raises:
        UserError: transformers is not installed, there is no such model, it is of another kind, or weights are missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{name} needs transformers", fix="pip install 'tokar[teachers]'") from error
    fix = f"give path a folder that save_pretrained of {' or '.join(sorted(set(kinds.values())))} wrote, or a hub id"
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError("no such folder", where=path, fix=fix)
    source = str(folder) if folder.is_dir() else path
    # On the CPU also where everything else is built without memory: its weights are real.
    with torch.device("cpu"), _quiet(bars=not folder.is_dir()):
        try:
            kind = str(transformers.AutoConfig.from_pretrained(source).model_type)
            if kind not in kinds:
                raise UserError(f"holds a model of type {kind!r}, not {name}", where=path, fix=fix)
            network, report = getattr(transformers, kinds[kind]).from_pretrained(
                source, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            raise UserError(f"no readable {name} model there", where=path, fix=fix) from error
    # A pooler, absent from DINO's files, would be made anew; nobody here reads it.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(f"lacks {len(missing)} tensors of {name}, first {missing[0]}", where=path, fix=fix)
    return network


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without transformers' load reports, and its progress bars but for a download: what is wrong is raised."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
