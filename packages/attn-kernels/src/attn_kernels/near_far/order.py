"""Raster order to tile order and back, as strided copies."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional as F

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import tile_counts


def to_tiles(x: Tensor, grids: Sequence[TokenGrid], tile_shape: tuple[int, int], out: Tensor) -> None:
    """Copy the tokens of the grids tile by tile; places of an edge tile without a token get zeros.

    Args:
        x: ``[H, N, D]``, a sequence that holds the grids.
        grids: The grids; their tiles follow each other.
        tile_shape: Rows and columns of tokens of a tile.
        out: ``[H, T, tile tokens, D]``, written.
    """
    for grid, tiles in _parts(grids, tile_shape, out):
        (height, width), (rows, columns) = tile_shape, tile_counts(grid, tile_shape)
        image = x[:, grid.start : grid.stop].view(len(x), grid.rows, grid.columns, -1)
        missing = (rows * height - grid.rows, columns * width - grid.columns)
        if any(missing):
            image = F.pad(image, (0, 0, 0, missing[1], 0, missing[0]))
        raster = image.view(len(x), rows, height, columns, width, -1)
        tiles.view(len(x), rows, columns, height, width, -1).copy_(raster.transpose(2, 3))


def from_tiles(tiles: Tensor, grids: Sequence[TokenGrid], tile_shape: tuple[int, int], out: Tensor) -> None:
    """Undo ``to_tiles``: write ``tiles`` ``[H, T, tile tokens, D]`` to the places of the grids in ``[H, N, D]``."""
    for grid, part in _parts(grids, tile_shape, tiles):
        (height, width), (rows, columns) = tile_shape, tile_counts(grid, tile_shape)
        raster = part.view(len(out), rows, columns, height, width, -1).transpose(2, 3)
        target = out[:, grid.start : grid.stop]
        if rows * height == grid.rows and columns * width == grid.columns:
            target.view(raster.shape).copy_(raster)
        else:
            padded = raster.reshape(len(out), rows * height, columns * width, -1)
            target.view(len(out), grid.rows, grid.columns, -1).copy_(padded[:, : grid.rows, : grid.columns])


def _parts(
    grids: Sequence[TokenGrid], tile_shape: tuple[int, int], tiles: Tensor
) -> Iterator[tuple[TokenGrid, Tensor]]:
    """Yield each grid with its part of ``tiles`` ``[H, T, ...]``."""
    first = 0
    for grid in grids:
        rows, columns = tile_counts(grid, tile_shape)
        yield grid, tiles[:, first : first + rows * columns]
        first += rows * columns
