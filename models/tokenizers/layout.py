"""What a tokenizer's codes look like: declared once by the tokenizer, read by everything downstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ...errors import UserError

Kind = Literal["raster", "sequence", "multiscale", "holistic"]


@dataclass(frozen=True)
class Stream:
    """A run of tokens that share a codebook and a grid.

    Args:
        name: e.g. `"patch"`, `"scale0"`.
        n_tokens: number of tokens.
        vocab_size: number of codes a token can take; codes are `0 … vocab_size-1`.
        embed_dim: width of a code's embedding.
        grid: rows and columns where the tokens form an image-like grid (raster order), else `None`.
        scale: index of the scale for multi-scale layouts, else `None`.
    """

    name: str
    n_tokens: int
    vocab_size: int
    embed_dim: int
    grid: tuple[int, int] | None = None
    scale: int | None = None


@dataclass(frozen=True)
class TokenLayout:
    """The shape and order of the codes `[B, total_tokens]` of one image: the streams, concatenated.

    Args:
        kind: `raster` (a 2-D grid), `sequence` (1-D), `multiscale` (scales concatenated, coarse first), `holistic` (mixed).
        streams: in canonical order.
        image_size: height and width in pixels of the image that these tokens describe.
        stride: pixels per token along a side, 0 where tokens have no place.
        multiple_of: any image whose sides are multiples of this can be encoded; 0: only `image_size`.
        prefix_decodable: the first k tokens alone decode to an image.
    """

    kind: Kind
    streams: tuple[Stream, ...]
    image_size: tuple[int, int]
    stride: int
    multiple_of: int = 0
    prefix_decodable: bool = False

    def __post_init__(self) -> None:
        for stream in self.streams:
            if stream.grid is not None and stream.grid[0] * stream.grid[1] != stream.n_tokens:
                raise ValueError(f"stream {stream.name}: grid {stream.grid} does not hold {stream.n_tokens} tokens")

    @property
    def total_tokens(self) -> int:
        """Number of codes per image."""
        return sum(stream.n_tokens for stream in self.streams)

    @property
    def vocab_size(self) -> int:
        """The largest vocabulary of any stream: what one shared output head needs."""
        return max(stream.vocab_size for stream in self.streams)

    def parallel(self, codes: Sequence[tuple[str, int, int]]) -> TokenLayout:
        """This layout for a quantizer that gives each token several codes: every stream once for each of them.

        Args:
            codes: `Quantizer.streams`: name, number of codes and width of each; a single one changes nothing.
        """
        if len(codes) == 1:
            return self
        streams = tuple(
            replace(stream, name=f"{stream.name}_{name}", vocab_size=size, embed_dim=dim)
            for stream in self.streams
            for name, size, dim in codes
        )
        return replace(self, streams=streams)

    def refuse_other_image(self, size: Sequence[int]) -> None:
        """For tokenizers of one size: an image of another height and width has no codes here.

        Raises:
            UserError: it is not `image_size`.
        """
        if tuple(size) != self.image_size:
            height, width = self.image_size
            raise UserError(
                f"an image of {size[0]}x{size[1]} pixels, but this tokenizer takes {height}x{width} alone",
                fix="resize or crop to that, or train one for your size",
            )

    def refuse_other_count(self, count: int) -> None:
        """Codes of whole images only.

        Raises:
            UserError: `count` is not `total_tokens`.
        """
        if count != self.total_tokens:
            raise UserError(
                f"{count} codes per image, but the layout has {self.total_tokens}", fix="give the codes of whole images"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLayout:
        """The inverse of `to_dict`; lists become tuples again."""
        streams = tuple(
            Stream(**{**stream, "grid": tuple(stream["grid"]) if stream.get("grid") else None}) for stream in values["streams"]
        )
        return cls(**{**values, "streams": streams, "image_size": tuple(values["image_size"])})

    def differences(self, other: TokenLayout) -> list[str]:
        """What differs from `other`, one clause each; empty when equal."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [f"{key} {mine[key]} here, {theirs[key]} there" for key in mine if mine[key] != theirs[key]]


def raster_layout(grid: tuple[int, int], vocab_size: int, embed_dim: int, stride: int) -> TokenLayout:
    """The layout of a CNN tokenizer: one code per cell of a grid, any image size that is a multiple of the stride."""
    stream = Stream("patch", grid[0] * grid[1], vocab_size, embed_dim, grid)
    return TokenLayout("raster", (stream,), (grid[0] * stride, grid[1] * stride), stride, multiple_of=stride)
