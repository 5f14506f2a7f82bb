"""How an image builds up: reconstructions from the first tokens alone, scale by scale or level by level.

Shapes: `B` batch, `N` tokens, `S` streams, `K` prefixes. Images are uint8 `[B, H, W, 3]` unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.stream import to_image, to_uint8
from ..errors import UserError
from ..models.tokenizers.base import Tokenizer
from ..models.tokenizers.quantizers.compose import ResidualQuantizer
from .images import Picture, save_figure
from .protocol import Result
from .reconstruction import ReconstructionScore, protocol_of
from .score import SampleScore

SHOWN = 8
"""Images in the picture."""


@dataclass(frozen=True)
class Prefix:
    """The first tokens of an image.

    Args:
        tokens: how many.
        about: which, in words.
        decode: codes `[B, N]` to images `[B, 3, H, W]` of them alone.
    """

    tokens: int
    about: str
    decode: Callable[[Tensor], Tensor]

    @property
    def end(self) -> str:
        """The scale or level that it ends with, if any."""
        return self.about.removeprefix("to ") if self.about.startswith("to ") else ""

    @property
    def name(self) -> str:
        """As numbers are called."""
        return f"first {self.tokens}"


def prefixes_of(tokenizer: Tokenizer) -> list[Prefix]:
    """The prefixes that decode to an image: whole scales, whole levels of a residual quantizer, or powers of two of a row.

    Raises:
        UserError: the tokenizer cannot decode a prefix.
    """
    layout = tokenizer.layout
    quantizer = getattr(tokenizer, "quantizer", None)
    if layout.prefix_decodable:
        return [Prefix(k, about, partial(tokenizer.decode_partial, k=k)) for k, about in _ends(tokenizer)]
    if isinstance(quantizer, ResidualQuantizer):
        return _levels(tokenizer, quantizer)
    raise UserError(
        f"{type(tokenizer).__name__} cannot decode a prefix of its {layout.kind} tokens",
        where="measure=prefixes",
        fix="measure a multi-scale or residual tokenizer, or set measure=quality",
    )


def captions_of(prefixes: Sequence[Prefix]) -> list[str]:
    """What stands above the columns of a picture of prefixes: how many tokens, and which scale or level they end with."""
    return [f"{prefix.tokens} · {prefix.end}" if prefix.end else str(prefix.tokens) for prefix in prefixes]


@torch.no_grad()
def build_up(tokenizer: Tokenizer, codes: Tensor) -> Picture | None:
    """Images `[B]` from each prefix of codes `[B, N]`, one row each; nothing where a prefix is no image."""
    if not can_decode_prefixes(tokenizer):
        return None
    prefixes = prefixes_of(tokenizer)
    images = torch.stack([to_uint8(prefix.decode(codes)) for prefix in prefixes], dim=1)
    return Picture(images.flatten(0, 1), captions_of(prefixes))


def can_decode_prefixes(tokenizer: Tokenizer) -> bool:
    """Whether `prefixes_of` has some."""
    return tokenizer.layout.prefix_decodable or isinstance(getattr(tokenizer, "quantizer", None), ResidualQuantizer)


def _ends(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    streams = tokenizer.layout.streams
    if len(streams) > 1:
        ends = accumulate(stream.n_tokens for stream in streams)
        return [(end, f"to {stream.name}") for end, stream in zip(ends, streams, strict=True)]
    total = tokenizer.layout.total_tokens
    return [(k, f"{k} of {total} tokens") for k in sorted({total, *(2**i for i in range(total.bit_length()))}) if k <= total]


def _levels(tokenizer: Tokenizer, quantizer: ResidualQuantizer) -> list[Prefix]:
    streams = tokenizer.layout.streams
    per_level = streams[0].n_tokens
    counts = [len(level.streams) for level in quantizer.parts.values()]  # type: ignore[arg-type, union-attr]

    def decode(codes: Tensor, levels: int) -> Tensor:
        grid = tokenizer.embed(codes[:1]).shape[2:]
        return tokenizer.decode(quantizer.embed_levels(codes.unflatten(1, (len(streams), *grid)), levels))

    return [
        Prefix(end * per_level, f"to {name}", partial(decode, levels=number))
        for number, (name, end) in enumerate(zip(quantizer.parts, accumulate(counts), strict=True), 1)
    ]


@dataclass(frozen=True)
class Measured:
    """A result and what is drawn of it.

    Args:
        result: numbers `first <k>/<metric>`.
        prefixes: in order.
        strips: `[n·(K+1), H, W, 3]` uint8: some images, from their first prefix to all tokens, and the original.
    """

    result: Result
    prefixes: list[Prefix]
    strips: Tensor

    def draw_images(self, path: Path) -> Path:
        """One row for each image."""
        columns = [*(captions_of(self.prefixes)), "original"]
        return Picture(self.strips, columns).save(path, scale=max(1, 96 // self.strips.shape[1]))

    def draw_curves(self, path: Path) -> Path:
        """Each metric against the number of tokens."""
        from matplotlib.figure import Figure

        metrics = list(dict.fromkeys(key.rpartition("/")[2] for key in self.result.numbers))
        figure = Figure(figsize=(3.2 * len(metrics), 2.6), layout="constrained")
        tokens = [prefix.tokens for prefix in self.prefixes]
        for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            axis.plot(tokens, [self.result.numbers[f"{prefix.name}/{metric}"] for prefix in self.prefixes], marker="o")
            axis.set_xscale("log", base=2)
            axis.set_xticks(tokens, [str(k) for k in tokens], rotation=90 if len(tokens) > 6 else 0)
            axis.minorticks_off()
            axis.set_title(metric.replace("_", " "))
            axis.set_xlabel("tokens")
        return save_figure(figure, path)


@torch.no_grad()
def evaluate_prefixes(
    tokenizer: Tokenizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    sides: Callable[[], tuple[SampleScore, SampleScore]] | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    data: Mapping[str, Any] | None = None,
    subject: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Measured:
    """Compare images with what each prefix of their tokens gives, as `evaluate_tokenizer` does with all of them.

    Args:
        tokenizer: in eval mode, on its own device.
        batches: mappings with `image` uint8 `[B, H, W, 3]`.
        sides: empty measures of features.
        perceptual: LPIPS-like distance `[B]` of two images in [-1, 1].
        data: names the images, for the protocol.
        subject: names the tokenizer.
        on_batch: told the number of images after each batch.

    Raises:
        UserError: the tokenizer cannot decode a prefix, or no image came.
    """
    prefixes = prefixes_of(tokenizer)
    scores = [ReconstructionScore(tokenizer.layout, sides, perceptual) for _ in prefixes]
    device = next(tokenizer.parameters()).device
    strips: list[Tensor] = []
    for batch in batches:
        codes = tokenizer.encode(to_image(batch["image"].to(device))).codes
        images = [prefix.decode(codes) for prefix in prefixes]
        for score, image in zip(scores, images, strict=True):
            score.update(batch, image, codes)
        if not strips:
            rows = torch.stack([*(to_uint8(image[:SHOWN]).cpu() for image in images), batch["image"][:SHOWN].cpu()], dim=1)
            strips.append(rows.flatten(0, 1))
        if on_batch:
            on_batch(len(codes))
    numbers = {
        f"{prefix.name}/{name}": value
        for prefix, score in zip(prefixes, scores, strict=True)
        for name, value in score.numbers().items()
        if not name.startswith("codebook")
    }
    protocol = protocol_of(scores[-1], True, data or {}) | {"prefixes": "whole scales or levels, or powers of two of a row"}
    about = {"prefixes": {prefix.name: prefix.about for prefix in prefixes}}
    return Measured(Result("prefixes", numbers, protocol, {**(subject or {}), **about}), prefixes, strips[0])
