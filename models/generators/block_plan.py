"""Blocks of tokens of every kind, from what a config says."""

from __future__ import annotations

from collections.abc import Sequence

from .orders import blocks, cells, chunks, scale_blocks, tiles
from .plan import Plan


def block_plan(
    grid: tuple[int, int] | None,
    n_tokens: int | None,
    grids: Sequence[Sequence[int]] | None,
    block: str,
    size: int,
) -> Plan:
    """The plan of block diffusion; tokens of several scales have places in a row, as a next-token model gives them.

    Args:
        grid: rows and columns of the tokens, `None` where they do not form one grid.
        n_tokens: how many, where they do not.
        grids: rows and columns of the scales, where there are.
        block: `chunks`, `rows`, `tiles` or `scales`.
        size: tokens of a chunk, rows of a block, side of a tile.

    Raises:
        ValueError: these tokens have no such blocks.
    """
    if grid is None and n_tokens is None:
        raise ValueError("no tokens; give grid (2-D tokens) or n_tokens (1-D tokens)")
    if grid is not None:
        grid = (grid[0], grid[1])
        return blocks(cells(grid), _groups_of_grid(grid, block, size), grid)
    count = int(n_tokens or 0)
    places = [(index,) for index in range(count)]
    if block == "scales":
        if grids is None:
            raise ValueError("tokens without scales have no block of that kind; choose chunks")
        return blocks(places, scale_blocks([rows * columns for rows, columns in grids]))
    if block != "chunks":
        raise ValueError(f"tokens in a row have no {block}; choose chunks")
    return blocks(places, chunks(count, size))


def _groups_of_grid(grid: tuple[int, int], block: str, size: int) -> list[list[int]]:
    """Tokens of each block of a grid."""
    if block == "scales":
        raise ValueError("a grid has no scales; choose chunks, rows or tiles")
    if block == "chunks":
        return chunks(grid[0] * grid[1], size)
    return tiles(grid, (size, grid[1]) if block == "rows" else (size, size))
