"""Where tiles and groups of tiles lie: small integer tables that depend on shapes alone, made once per geometry."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import exact_ranges, tile_counts

_MEMBERS = 16
"""Most tiles of a group: each has a bit, and the mask of a block of keys a column."""
_CHOSEN = 128
"""Most chosen tiles of a group of several tiles: each is compared with each."""


@dataclass(frozen=True, eq=False)
class FusedTables:
    """Geometry of one sequence, int32 on the device.

    Attributes:
        tiles: ``[T, 8]``: grid, row and column of tiles, first token, rows and columns of tokens, columns of the grid.
        groups: ``[G, 8]``: first token, rows and columns of the grid, row and column of the group's first tile, the
            grid's first tile, its rows and columns of tiles.
        outside: ``[E]``, the tokens outside every grid.
        ranges: ``[R, 2]``, start and stop of blocks of tokens: first of all tokens, then of those outside the grids.
        all_ranges: How many of these are of all tokens.
    """

    tiles: Tensor
    groups: Tensor
    outside: Tensor
    ranges: Tensor
    all_ranges: int


def group_shape(tile_shape: tuple[int, int], queries: int, top_k: int) -> tuple[int, int]:
    """Return the rows and columns of tiles that share a program: the most tokens that fit, as square as may be.

    Args:
        tile_shape: Rows and columns of tokens of a tile.
        queries: Queries of a program; a tile of more is answered in parts.
        top_k: Chosen tiles per tile.
    """
    (height, width), best = tile_shape, (1, 1)
    for rows, columns in product(range(1, _MEMBERS + 1), repeat=2):
        members = rows * columns
        if members > _MEMBERS or members * height * width > queries or members * top_k > _CHOSEN:
            continue
        # More tiles first; then the shorter outline, which has fewer tiles around it; then along the rows of memory.
        rank = (members, -(rows * height + columns * width), columns)
        if rank > (best[0] * best[1], -(best[0] * height + best[1] * width), best[1]):
            best = (rows, columns)
    return best


@lru_cache(maxsize=64)
def fused_tables(
    grids: tuple[TokenGrid, ...],
    length: int,
    tile_shape: tuple[int, int],
    group: tuple[int, int],
    block: int,
    device: torch.device,
    stream: int,
) -> FusedTables:
    """Build the tables on the device; nothing is copied from the host.

    Args:
        grids: Grids of the sequence.
        length: Tokens of the sequence.
        tile_shape: Rows and columns of tokens of a tile.
        group: Rows and columns of tiles of a group.
        block: Tokens of a range.
        device: Where the kernels run.
        stream: Handle of the stream on which they run; tables of another stream might not be written yet.
    """
    del stream
    tiles, groups, first = [], [], 0
    for index, grid in enumerate(grids):
        (height, width), (rows, columns) = tile_shape, tile_counts(grid, tile_shape)
        row, column = _places(rows, columns, (1, 1), device)
        tiles.append(
            _table(
                index,
                row,
                column,
                grid.start + row * height * grid.columns + column * width,
                (grid.rows - row * height).clamp(max=height),
                (grid.columns - column * width).clamp(max=width),
                grid.columns,
                0,
            )
        )
        row, column = _places(rows, columns, group, device)
        groups.append(_table(grid.start, grid.rows, grid.columns, row, column, first, rows, columns))
        first += rows * columns
    outside = exact_ranges(grids, length)
    blocks = [_blocks(0, length, block, device)]
    blocks += [_blocks(start, stop, block, device) for start, stop in outside]
    tokens = [torch.arange(start, stop, dtype=torch.int32, device=device) for start, stop in outside]
    return FusedTables(
        tiles=torch.cat(tiles),
        groups=torch.cat(groups),
        outside=torch.cat(tokens or [torch.zeros(0, dtype=torch.int32, device=device)]),
        ranges=torch.cat(blocks),
        all_ranges=len(blocks[0]),
    )


def _places(rows: int, columns: int, step: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every ``step``-th place of a grid of tiles, in raster order."""
    row = torch.arange(0, rows, step[0], dtype=torch.int32, device=device)
    column = torch.arange(0, columns, step[1], dtype=torch.int32, device=device)
    return row.repeat_interleave(len(column)), column.repeat(len(row))


def _table(*fields: Tensor | int) -> Tensor:
    """Put columns beside each other; a number fills its column."""
    shape = next(field for field in fields if isinstance(field, Tensor))
    columns = [field if isinstance(field, Tensor) else torch.full_like(shape, field) for field in fields]
    return torch.stack(columns, dim=-1)


def _blocks(start: int, stop: int, block: int, device: torch.device) -> Tensor:
    """Cut a range of tokens into blocks; returns ``[blocks, 2]``."""
    first = torch.arange(start, stop, block, dtype=torch.int32, device=device)
    return torch.stack([first, (first + block).clamp(max=stop)], dim=-1)
