"""tokar: image tokenizers and autoregressive image generators on one spine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .loaded import Loaded

__all__ = ["load"]


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    ema: bool = True,
    device: str | torch.device = "cpu",
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Loaded:
    """A trained or published model as an object that takes and gives numpy arrays; docs/example.py shows it.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint, what `tokar export` wrote, or the checkpoint file of a
            published model (LlamaGen, GigaTok, VAR, RAR, TiTok, Open-MAGVIT2, IBQ, DD1; see `tokar convert`).
        tokenizer: of a generator or a student, a path of the same kinds; `None`: the one that it was trained with. Published
            files do not say theirs.
        ema: prefer the averaged weights where there are some.
        device: where the networks go: `"cpu"`, `"cuda"`, `"cuda:1"`.
        family: of a published file whose keys fit several (D-AR's are LlamaGen's; `var` beside its tokenizer in one file).
        config: of a published file, arguments of the original that its weights do not tell: `{"block_size": 576}` for
            LlamaGen's generators at 384 pixels.
        image_size: side of the images, for a tokenizer of grids that takes several; published ones begin with 256.

    Returns:
        A `LoadedTokenizer` (`encode`, `decode`), a `LoadedGenerator` or `LoadedDistilled` (these and `sample`), or a
        `LoadedClassifier` (`classify`), in eval mode.

    Raises:
        UserError: there is no model, its files are broken, its tokenizer is gone or another one, or there is no
            such device.
    """
    from .loaded import load as open_at

    return open_at(path, tokenizer=tokenizer, ema=ema, device=device, family=family, config=config, image_size=image_size)
