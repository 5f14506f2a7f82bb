"""GigaTok's transformers between the CNN's map and the quantizer: a grid to a row of tokens, back, and grid to grid.

Shapes: `B` batch, `Z` channels of a map, `W` width, `h`, `w` rows and columns of the CNN's map, `P = h*w` patches,
`N` tokens. A row of tokens is a map `[B, Z, 1, N]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...ranges import PositiveInt
from ..layers import sincos_table
from .layout import Kind
from .vit import DecoderLayer, EncoderLayer, grid_of, position_table

Size = tuple[int, int]


class LatentTransformer(nn.Module, ABC):
    """A transformer from one map of `Z` channels to another.

    Args:
        sizes: rows and columns of the map that comes in, and of the one that goes out.
        z_channels: `Z`.
        width: `W`.
        layers: its layers.
        patches: `P`, for the table of their positions.
        kernel: side of the convolution that ends it.
    """

    kind: Kind = "sequence"  # of the tokens

    def __init__(
        self, sizes: tuple[Size, Size], z_channels: int, width: int, layers: Iterable[nn.Module], patches: int, kernel: int
    ) -> None:
        super().__init__()
        (self.size_in, self.size_out), self.z_channels, self.width = sizes, z_channels, width
        self.norm_in = nn.LayerNorm(z_channels)
        self.embed = nn.Linear(z_channels, width)
        self.positions = position_table(patches, width)
        self.layers = nn.ModuleList(layers)
        self.norm_out = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, z_channels, kernel, padding=kernel // 2)

    @abstractmethod
    def forward(self, z: Tensor, tap: int = 0) -> tuple[Tensor, Tensor | None]:
        """The new map, and what left layer number `tap` (`[B, P or N, W]`, not normalised; layers count from 1).

        Args:
            z: `[B, Z, *size_in]`.
            tap: 0: none.
        """

    def _tokens(self, z: Tensor) -> Tensor:
        return self.embed(self.norm_in(z.flatten(2).transpose(1, 2)))

    def _through(self, x: Tensor, step: Callable[[nn.Module, Tensor], Tensor], tap: int) -> tuple[Tensor, Tensor | None]:
        """`step(layer, x)` for every layer, then the map."""
        tapped = None
        for depth, layer in enumerate(self.layers, start=1):
            x = step(layer, x)
            if depth == tap:
                tapped = x
        # Contiguous, so that the weight's memory format decides about the map's: a transposed view looks channels-last.
        return self.conv_out(self.norm_out(x).transpose(1, 2).unflatten(2, self.size_out).contiguous()), tapped


class TokenEncoder(LatentTransformer):
    """Queries that read the CNN's map into a row of tokens (a Q-Former).

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        tokens: `N`; a power of two with pooled queries.
        z_channels: `Z`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a cell of the map: the stride of the CNN.
        queries: how the queries begin: averages of the map from coarse to fine (`pooled`, see `pooling_matrix`), its mean
            (`mean`), or learned vectors.
        qk_norm: LayerNorm on queries and keys of each head.
        positions: how the learned tables of positions begin: `random`, as published, or `sincos`, the two-dimensional sines and
            cosines of the patches with the tokens at the averages of their blocks (`pooling_matrix`). Attention finds its
            places far sooner from there, which short runs need.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        width: PositiveInt = 512,
        layers: PositiveInt = 6,
        heads: PositiveInt = 8,
        tokens: PositiveInt = 256,
        z_channels: PositiveInt = 256,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
        queries: Literal["pooled", "mean", "learned"] = "pooled",
        qk_norm: bool = False,
        positions: Literal["random", "sincos"] = "random",
    ) -> None:
        grid = grid_of(image_size, patch)
        stack = (DecoderLayer(width, heads, qk_norm) for _ in range(layers))
        super().__init__((grid, (1, tokens)), z_channels, width, stack, grid[0] * grid[1], kernel=1)
        self.token_positions = position_table(tokens, width)
        self.queries = position_table(tokens, width) if queries == "learned" else None
        self.query_proj = None if queries == "learned" else nn.Linear(width, width)
        self.pool: Tensor | None
        self.register_buffer("pool", pooling_matrix(tokens, grid) if queries == "pooled" else None, persistent=False)
        if positions == "sincos":
            _place(self.positions, self.token_positions, grid)

    def forward(self, z: Tensor, tap: int = 0) -> tuple[Tensor, Tensor | None]:
        """`[B, Z, h, w]` to `[B, Z, 1, N]`, and what left layer `tap`."""
        values = self._tokens(z)
        memory = (values + self.positions, values)
        return self._through(self._queries(values), lambda layer, x: layer(x, self.token_positions, memory), tap)

    def _queries(self, patches: Tensor) -> Tensor:
        if self.query_proj is None:
            assert self.queries is not None
            return self.queries.expand(patches.shape[0], -1, -1)
        if self.pool is None:
            return self.query_proj(patches.mean(1, keepdim=True)).expand(-1, self.size_out[1], -1)
        return self.query_proj(self.pool.to(patches.dtype) @ patches)


def pooling_sizes(tokens: int) -> list[Size]:
    """Rows and columns of each group of pooled queries: 1x1, 1x1, 1x2, 2x2, 2x4, … up to half of the tokens.

    Raises:
        ValueError: not a power of two.
    """
    if tokens & (tokens - 1):
        raise ValueError(f"{tokens} tokens are not a power of two, which pooled queries need; change tokens or queries")
    levels = [max(group - 1, 0) for group in range(tokens.bit_length())]
    return [(2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in levels]


def pooling_matrix(tokens: int, grid: Size) -> Tensor:
    """`[N, P]`: row n averages the patches that query n begins with, groups coarse to fine, each in raster order.

    Raises:
        ValueError: a group does not divide the grid.
    """
    rows, columns = (torch.arange(side, device="cpu") for side in grid)  # a table of facts: real also in a model on meta
    blocks = []
    for size in pooling_sizes(tokens):
        if grid[0] % size[0] or grid[1] % size[1]:
            raise ValueError(
                f"{tokens} tokens begin as averages over {size[0]}x{size[1]} blocks, which do not divide a grid of "
                f"{grid[0]}x{grid[1]} patches; take fewer tokens or queries=learned"
            )
        block = (rows * size[0] // grid[0])[:, None] * size[1] + columns * size[1] // grid[1]
        member = nn.functional.one_hot(block.flatten(), size[0] * size[1]).T.float()
        blocks.append(member / member.sum(1, keepdim=True))
    return torch.cat(blocks)


def _place(patches: nn.Parameter, tokens: nn.Parameter, grid: Size) -> None:
    """Fill the tables of positions of patches and tokens with sines and cosines and their averages."""
    with torch.no_grad():
        table = sincos_table(grid, patches.shape[1])
        patches.copy_(table)
        tokens.copy_(pooling_matrix(tokens.shape[0], grid) @ table)


class TokenDecoder(LatentTransformer):
    """Spatial queries that read a row of tokens back into a map.

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        tokens: `N`.
        z_channels: `Z`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a cell of the map: the stride of the CNN.
        queries: every query begins as the first token (`first`), or as a learned vector.
        qk_norm: LayerNorm on queries and keys of each head.
        positions: how the learned tables of positions begin: `random`, as published, or `sincos`, the two-dimensional sines and
            cosines of the patches with the tokens at the averages of their blocks (`pooling_matrix`). Attention finds its
            places far sooner from there, which short runs need.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        width: PositiveInt = 512,
        layers: PositiveInt = 6,
        heads: PositiveInt = 8,
        tokens: PositiveInt = 256,
        z_channels: PositiveInt = 256,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
        queries: Literal["first", "learned"] = "first",
        qk_norm: bool = False,
        positions: Literal["random", "sincos"] = "random",
    ) -> None:
        grid = grid_of(image_size, patch)
        stack = (DecoderLayer(width, heads, qk_norm) for _ in range(layers))
        super().__init__(((1, tokens), grid), z_channels, width, stack, grid[0] * grid[1], kernel=3)
        self.token_positions = position_table(tokens, width)
        self.queries = position_table(grid[0] * grid[1], width) if queries == "learned" else None
        if positions == "sincos":
            _place(self.positions, self.token_positions, grid)

    def forward(self, z: Tensor, tap: int = 0) -> tuple[Tensor, Tensor | None]:
        """`[B, Z, 1, N]` to `[B, Z, h, w]`, and what left layer `tap`."""
        values = self._tokens(z)
        memory = (values + self.token_positions, values)
        if self.queries is None:
            queries = values[:, :1].expand(-1, self.positions.shape[0], -1)
        else:
            queries = self.queries.expand(values.shape[0], -1, -1)
        return self._through(queries, lambda layer, x: layer(x, self.positions, memory), tap)


class GridTransformer(LatentTransformer):
    """A transformer that keeps the CNN's map, one token for each cell.

    Args:
        width: `W`.
        layers: number of layers.
        heads: of each attention.
        z_channels: `Z`.
        image_size: side, or height and width, of the images.
        patch: pixels a side of a cell of the map: the stride of the CNN.
        layer: `plain` self-attention with positions added once to the input; `cross`, the decoder layer whose memory is what
            enters it; `twin`, the decoder layer whose second attention looks at the normalised queries themselves.
        kernel: side of the convolution that ends it (GigaTok: 1 in the encoder, 3 in the decoder).

    Raises:
        ValueError: sizes that do not fit each other.
    """

    kind = "raster"

    def __init__(
        self,
        width: PositiveInt = 512,
        layers: PositiveInt = 6,
        heads: PositiveInt = 8,
        z_channels: PositiveInt = 256,
        image_size: PositiveInt | Sequence[PositiveInt] = 256,
        patch: PositiveInt = 16,
        layer: Literal["plain", "cross", "twin"] = "plain",
        kernel: Literal[1, 3] = 1,
    ) -> None:
        grid = grid_of(image_size, patch)
        make = EncoderLayer if layer == "plain" else DecoderLayer
        stack = (make(width, heads) for _ in range(layers))
        super().__init__((grid, grid), z_channels, width, stack, grid[0] * grid[1], kernel)
        self.layer = layer

    def forward(self, z: Tensor, tap: int = 0) -> tuple[Tensor, Tensor | None]:
        """`[B, Z, h, w]` to the same, and what left layer `tap`."""
        x = self._tokens(z)
        if self.layer == "plain":
            return self._through(x + self.positions, lambda layer, x: layer(x), tap)
        if self.layer == "cross":
            return self._through(x, lambda layer, x: layer(x, self.positions, (x + self.positions, x)), tap)
        return self._through(x, lambda layer, x: layer(x, self.positions, None), tap)
