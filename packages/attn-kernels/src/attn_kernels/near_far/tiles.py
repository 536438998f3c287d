"""Tiles of token grids: configuration, geometry, means and cost of near-far attention.

Everything here is either plain integers or a tensor that depends on shapes alone, so nothing waits for the device.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.grid import TokenGrid


@dataclass(frozen=True)
class NearFarConfig:
    """What near-far attention keeps exact.

    Attributes:
        tile: Tokens along a side of a tile, or ``(rows, columns)``; edge tiles may be smaller.
        radius: Tiles within this Chebyshev distance of a query's own tile stay exact; 0 = only its own.
        top_k: Further tiles kept exact, chosen per head and query tile; 0 = none.
        exact_queries: What queries outside every grid see: ``"exact"`` every key, ``"pooled"`` the tokens outside the
            grids and every tile pooled.
    """

    tile: int | tuple[int, int] = 4
    radius: int = 1
    top_k: int = 8
    exact_queries: Literal["exact", "pooled"] = "exact"

    def __post_init__(self) -> None:
        if min(self.tile_shape) < 1 or self.radius < 0 or self.top_k < 0:
            raise ValueError(f"near-far needs tile >= 1, radius >= 0 and top_k >= 0, got {self}")
        if self.exact_queries not in ("exact", "pooled"):
            raise ValueError(f"exact_queries must be 'exact' or 'pooled', got {self.exact_queries!r}")

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns of tokens of a full tile."""
        return (self.tile, self.tile) if isinstance(self.tile, int) else self.tile


class NearFarCorrections(NamedTuple):
    """Learnt correction of pooled scores, per head: ``temperature * score + bias + log n_c``.

    Attributes:
        temperature: ``[H]``; 1 leaves the score as it is.
        bias: ``[H]``; 0 leaves the score as it is.
    """

    temperature: Tensor
    bias: Tensor


def check_grids(grids: Sequence[TokenGrid], length: int) -> tuple[TokenGrid, ...]:
    """Return the grids as a tuple.

    Raises:
        ValueError: No grid, grids that overlap, or one that ends after ``length`` tokens.
    """
    if not grids:
        raise ValueError("near-far attention needs at least one TokenGrid; without one use softmax_attention")
    covered = 0
    for grid in sorted(grids, key=lambda grid: grid.start):
        if grid.start < covered or grid.stop > length:
            raise ValueError(f"grids must not overlap and must end by {length} tokens, got {list(grids)}")
        covered = grid.stop
    return tuple(grids)


def tile_counts(grid: TokenGrid, tile_shape: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of tiles of a grid."""
    return -(-grid.rows // tile_shape[0]), -(-grid.columns // tile_shape[1])


def exact_ranges(grids: Sequence[TokenGrid], length: int) -> tuple[tuple[int, int], ...]:
    """Return the half-open, non-empty ranges of tokens outside every grid, in order."""
    ranges, covered = [], 0
    for grid in sorted(grids, key=lambda grid: grid.start):
        ranges.append((covered, grid.start))
        covered = grid.stop
    ranges.append((covered, length))
    return tuple((start, stop) for start, stop in ranges if stop > start)


def tile_total(grids: Sequence[TokenGrid], tile_shape: tuple[int, int]) -> int:
    """Return the number of tiles of all grids."""
    return sum(rows * columns for rows, columns in (tile_counts(grid, tile_shape) for grid in grids))


def tile_sizes(grids: Sequence[TokenGrid], tile_shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return ``[T]`` int64, the tokens in each tile; tiles are numbered grid after grid, each in raster order."""
    sizes = []
    for grid in grids:
        rows, columns = (
            (tokens - torch.arange(0, tokens, side, device=device)).clamp(max=side)
            for tokens, side in zip((grid.rows, grid.columns), tile_shape, strict=True)
        )
        sizes.append((rows[:, None] * columns).flatten())
    return torch.cat(sizes)


def near_tiles(grids: Sequence[TokenGrid], tile_shape: tuple[int, int], radius: int, device: torch.device) -> Tensor:
    """Return ``[T, W]`` int64: for each tile the tiles of its grid within Chebyshev distance ``radius``, itself too.

    W is the same for all tiles; a tile with fewer neighbours names the tile T, which does not exist.
    """
    total, first, lists = tile_total(grids, tile_shape), 0, []
    for grid in grids:
        rows, columns = tile_counts(grid, tile_shape)
        row, row_inside = _window(rows, radius, device)
        column, column_inside = _window(columns, radius, device)
        tiles = first + row[:, None, :, None] * columns + column[None, :, None, :]  # [rows, columns, Wr, Wc]
        inside = row_inside[:, None, :, None] & column_inside[None, :, None, :]
        lists.append(torch.where(inside, tiles, total).flatten(2).flatten(0, 1))
        first += rows * columns
    width = max(part.shape[1] for part in lists)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=total) for part in lists])


def _window(count: int, radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each of ``count`` places a window of places, and which of them are within ``radius``."""
    width = min(2 * radius + 1, count)
    place = torch.arange(count, device=device)[:, None]
    window = (place - radius).clamp(0, count - width) + torch.arange(width, device=device)
    return window, (window - place).abs() <= radius


def tile_sums(x: Tensor, grid: TokenGrid, tile_shape: tuple[int, int]) -> Tensor:
    """Sum ``x`` ``[B, H, N, D]`` over each tile of one grid.

    Returns:
        ``[B, H, tiles of the grid, D]`` in float32 (float64 for float64).
    """
    (height, width), (rows, columns) = tile_shape, tile_counts(grid, tile_shape)
    batch, heads, _, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    image = x[:, :, grid.start : grid.stop].to(wide).reshape(batch, heads, grid.rows, grid.columns, channels)
    missing = (rows * height - grid.rows, columns * width - grid.columns)
    if any(missing):
        image = F.pad(image, (0, 0, 0, missing[1], 0, missing[0]))
    # One axis at a time is over ten times as fast as both in one call.
    strips = image.view(batch, heads, rows, height, columns, width, channels).sum(dim=3)
    return strips.sum(dim=4).flatten(2, 3)


def pool_tiles(
    tensors: Sequence[Tensor], grids: Sequence[TokenGrid], tile_shape: tuple[int, int], key_mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Average tensors over the unmasked tokens of each tile.

    Args:
        tensors: Each ``[B, H, N, D]``.
        grids: Grids of the sequence.
        tile_shape: Rows and columns of tokens of a tile.
        key_mask: ``[B, N]`` bool, True = keep.

    Returns:
        The means, each ``[B, H, T, D]`` in float32 (float64 for float64), zero for a tile without tokens; and the
        numbers of unmasked tokens ``[B, T]`` in the same dtype (``[1, T]`` without a mask).
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if key_mask is None:
        counts = tile_sizes(grids, tile_shape, tensors[0].device).to(wide)[None]
    else:
        kept = key_mask[:, None, :, None]
        counts = torch.cat([tile_sums(kept.to(wide), grid, tile_shape) for grid in grids], dim=2)[:, 0, :, 0]
        tensors = [torch.where(kept, tensor, 0) for tensor in tensors]
    divisor = counts.clamp(min=1)[:, None, :, None]
    return [torch.cat([tile_sums(x, grid, tile_shape) for grid in grids], dim=2) / divisor for x in tensors], counts


def near_far_keys(grids: Sequence[TokenGrid], length: int, config: NearFarConfig) -> float:
    """Return the mean number of keys that a query meets; exact attention meets ``length``.

    A pooled tile is one key. Which tiles are chosen depends on the data, so a chosen tile counts with the mean size
    of the far tiles.

    Args:
        grids: Grids of the sequence.
        length: Tokens of the sequence.
        config: What stays exact.

    Raises:
        ValueError: The grids do not fit ``length``.
    """
    grids = check_grids(grids, length)
    tiles = tile_total(grids, config.tile_shape)
    image = sum(grid.tokens for grid in grids)
    outside = length - image
    total = float(outside * (length if config.exact_queries == "exact" else outside + tiles))
    for grid in grids:
        row_windows = _windows(grid.rows, config.tile_shape[0], config.radius)
        column_windows = _windows(grid.columns, config.tile_shape[1], config.radius)
        for (rows, row_weight), (columns, column_weight) in product(row_windows, column_windows):
            near, far_tiles = rows[1] * columns[1], tiles - rows[0] * columns[0]
            chosen = min(config.top_k, far_tiles)
            chosen_tokens = chosen * (image - near) / max(1, far_tiles)
            keys = outside + near + chosen_tokens + (far_tiles - chosen)
            total += row_weight * column_weight * keys
    return total / length


def _windows(tokens: int, tile: int, radius: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield the distinct ``(tiles, tokens)`` within reach along one axis, and how many query tokens have each."""
    sizes = [min(tile, tokens - first) for first in range(0, tokens, tile)]
    windows: Counter[tuple[int, int]] = Counter()
    for index, size in enumerate(sizes):
        window = sizes[max(0, index - radius) : index + radius + 1]
        windows[len(window), sum(window)] += size
    yield from windows.items()
