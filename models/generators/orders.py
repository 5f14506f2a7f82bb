"""Reveal orders: every Plan that the field knows, each a few lines over the one rule.

Shapes: `N` tokens of an image, `S` slots, `P` tokens that are revealed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .plan import NO_PLACE, Plan

Grid = tuple[int, int]


def cells(grid: Grid) -> list[tuple[int, int]]:
    """Row and column of every token of a grid, row by row."""
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def raster(grid: Grid, prefix: int = 1) -> Plan:
    """Next-token over a grid, row by row.

    Args:
        grid: rows and columns.
        prefix: slots before the first token (1 for a class); the last of them predicts token 0.
    """
    return next_token(cells(grid), range(grid[0] * grid[1]), prefix, grid)


def sequence(n_tokens: int, prefix: int = 1) -> Plan:
    """Next-token over a 1-D sequence; places are `0 … n_tokens-1`."""
    return next_token([(index,) for index in range(n_tokens)], range(n_tokens), prefix)


def raster_or_sequence(grid: Grid | None, n_tokens: int | None, prefix: int = 1) -> Plan:
    """Next-token over a grid or over a row, whichever is given.

    Raises:
        ValueError: both are given, or neither.
    """
    if (grid is None) == (n_tokens is None):
        raise ValueError("give exactly one of grid (2-D tokens) and n_tokens (1-D tokens)")
    return raster((grid[0], grid[1]), prefix) if grid is not None else sequence(int(n_tokens or 0), prefix)


def next_token(places: Sequence[tuple[int, ...]], perm: Sequence[int], prefix: int = 1, grid: Grid | None = None) -> Plan:
    """One token after the other in any order (RAR's, RandAR's): slot i holds token `perm[i-1]` and predicts `perm[i]`.

    Args:
        places: of each token.
        perm: tokens in the order in which they are revealed.
        prefix: slots before the first token; the last of them predicts `perm[0]`.
        grid: rows and columns, where the tokens form one grid.
    """
    nowhere = (NO_PLACE,) * len(places[0])
    return Plan(
        perm=tuple(perm),
        unit=tuple(range(1 - prefix, len(perm))),
        holds=(-1,) * prefix + tuple(perm[:-1]),
        predicts=((-1,),) * (prefix - 1) + tuple((token,) for token in perm),
        coords=(nowhere,) * prefix + tuple(places[token] for token in perm[:-1]),
        grid=grid,
    )


def diagonals(grid: Grid) -> Plan:
    """NAR: anti-diagonals, `rows + columns - 1` units; a token predicts its right neighbour and the one below, by two heads.

    The class slot predicts the first token by both.
    """
    rows, columns = grid
    order = sorted(range(rows * columns), key=lambda token: (token // columns + token % columns, token // columns))
    fed = [token for token in order if token != rows * columns - 1]

    def neighbours(token: int) -> tuple[int, int]:
        row, column = divmod(token, columns)
        return token + 1 if column + 1 < columns else -1, token + columns if row + 1 < rows else -1

    return Plan(
        perm=tuple(order),
        unit=(0, *(sum(divmod(token, columns)) + 1 for token in fed)),
        holds=(-1, *fed),
        predicts=((0, 0), *map(neighbours, fed)),
        coords=((NO_PLACE, NO_PLACE), *(divmod(token, columns) for token in fed)),
        grid=grid,
    )


def parallel(grid: Grid, regions: Grid) -> Plan:
    """PAR: the first token of each of `P` regions one by one, then one of each region at a time, all at the same site.

    From the first parallel unit on a slot predicts the token of its region at the next site; `P - 1` fillers, which have no
    place, stand beside the last of the single tokens to make the first of those units whole.

    Args:
        grid: rows and columns of the tokens.
        regions: rows and columns of regions, `P` in all.

    Raises:
        ValueError: the regions do not divide the grid.
    """
    rows, columns = grid
    height, width = rows // regions[0], columns // regions[1]
    if rows % regions[0] or columns % regions[1]:
        raise ValueError(f"{regions[0]}x{regions[1]} regions do not divide a grid of {rows}x{columns}; choose others")
    corners = [(row * height, column * width) for row, column in cells(regions)]
    groups = [[(row + y) * columns + column + x for row, column in corners] for y, x in cells((height, width))]
    first, later, count = groups[0], groups[1:], len(corners)
    single: list[tuple[int, ...]] = [(token,) for token in first]
    slots = [(-1, 0), *((token, index + 1) for index, token in enumerate(first[:-1]))]
    if later:
        slots += [(first[-1], count), *[(-1, count)] * (count - 1)]
        slots += [(token, count + 1 + index) for index, group in enumerate(later[:-1]) for token in group]
    return Plan(
        perm=tuple(token for group in groups for token in group),
        unit=tuple(unit for _, unit in slots),
        holds=tuple(token for token, _ in slots),
        predicts=(*single, *((token,) for group in later for token in group)),
        coords=tuple(divmod(token, columns) if token >= 0 else (NO_PLACE, NO_PLACE) for token, _ in slots),
        grid=grid,
    )


def scales(grids: Sequence[Grid]) -> Plan:
    """VAR and its kin: all tokens of a scale at once, each slot predicting its own token; also bands (NFIG) and FlexVAR.

    Tokens lie scale by scale, as in a multi-scale layout. Places are (scale, row, column).

    Args:
        grids: rows and columns of each scale, coarse first.
    """
    places = [(scale, *cell) for scale, grid in enumerate(grids) for cell in cells(grid)]
    return Plan(
        perm=tuple(range(len(places))),
        unit=tuple(scale for scale, *_ in places),
        holds=(-1,) * len(places),
        predicts=tuple((token,) for token in range(len(places))),
        coords=tuple(places),
    )


def chunks(n_tokens: int, size: int) -> list[list[int]]:
    """Blocks of `size` tokens that follow one another in layout order; the last may be shorter."""
    return [list(range(start, min(start + size, n_tokens))) for start in range(0, n_tokens, size)]


def tiles(grid: Grid, tile: Grid) -> list[list[int]]:
    """Blocks of `tile` rows and columns, row by row (xAR's cells); rows are tiles `(1, columns)`.

    Raises:
        ValueError: the tiles do not divide the grid.
    """
    if grid[0] % tile[0] or grid[1] % tile[1]:
        raise ValueError(f"blocks of {tile[0]}x{tile[1]} do not divide a grid of {grid[0]}x{grid[1]}; choose others")
    corners = cells((grid[0] // tile[0], grid[1] // tile[1]))
    return [[(y * tile[0] + row) * grid[1] + x * tile[1] + column for row, column in cells(tile)] for y, x in corners]


def scale_blocks(sizes: Sequence[int]) -> list[list[int]]:
    """Blocks of several sizes in layout order: the scales of a multi-scale tokenizer."""
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def blocks(places: Sequence[tuple[int, ...]], groups: Sequence[Sequence[int]], grid: Grid | None = None) -> Plan:
    """Block diffusion (BD3-LM, SDAR, ACDiT): `N` noisy slots that predict their own tokens, then the class and `N` clean ones.

    The class is clean and of unit -1: every slot sees it.

    Args:
        places: of each token; both streams share them.
        groups: tokens of each block, in the order in which the blocks are revealed.
        grid: rows and columns, where the tokens form one grid.
    """
    perm = tuple(token for group in groups for token in group)
    unit = tuple(index for index, group in enumerate(groups) for _ in group)
    coords = tuple(places[token] for token in perm)
    return Plan(
        perm=perm,
        unit=(*unit, -1, *unit),
        holds=(*perm, -1, *perm),
        predicts=(*((token,) for token in perm), *((-1,) for _ in range(len(perm) + 1))),
        coords=(*coords, (NO_PLACE,) * len(places[0]), *coords),
        grid=grid,
        stream=(1,) * len(perm) + (0,) * (len(perm) + 1),
        cache_mode="append_on_commit",
    )
