"""tokar: image tokenizers and autoregressive image generators on one spine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]


def load(path: str | Path, *, ema: bool = True, device: str = "cpu") -> nn.Module:
    """The model of a run, a checkpoint or an exported model, in eval mode.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint, or what `tokar export` wrote.
        ema: prefer the averaged weights where there are some.
        device: where the weights go.

    Returns:
        A `Tokenizer`, a `Generator` or a `Classifier`, whichever lies there.

    Raises:
        UserError: there is no model, or its files are broken.
    """
    from .models.build import load_model, locate_model

    return load_model(locate_model(Path(path)), ema=ema, device=device)
