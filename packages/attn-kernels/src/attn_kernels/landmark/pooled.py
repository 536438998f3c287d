"""Pooled landmarks: one key per tile of an image, weighted with the number of tokens that it stands for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask
from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import check_grids, exact_ranges, pool_tiles


class PooledLandmarks(NamedTuple):
    """Mean keys and values of tiles.

    Attributes:
        k: ``[B, H, T, D]``, mean of the unmasked keys of each tile; 0 for a tile without any.
        v: ``[B, H, T, Dv]``, mean of their values.
        log_count: ``[B, T]`` float32 (float64 for float64), logarithm of their number, added to the score of the tile;
            ``-inf`` for a tile without any.
    """

    k: Tensor
    v: Tensor
    log_count: Tensor


def pooled_landmarks(
    k: Tensor,
    v: Tensor,
    *,
    grids: Sequence[TokenGrid],
    tile: int | tuple[int, int] = 4,
    key_mask: Tensor | None = None,
) -> PooledLandmarks:
    """Pool the tokens of each tile into one key and one value.

    A tile of equal keys and values is represented exactly: ``n exp(s) = exp(s + log n)``.

    Args:
        k: ``[B, H, N, D]``, after RoPE; pooled as they are.
        v: ``[B, H, N, Dv]``.
        grids: Grids of image tokens, cut into tiles one after the other.
        tile: Tokens along a side of a tile, or ``(rows, columns)``; edge tiles may be smaller.
        key_mask: ``[B, N]`` bool, True = keep. Masked tokens leave the means and the counts, and may hold anything.

    Returns:
        Keys and values in the dtypes of ``k`` and ``v``, averaged in float32.

    Raises:
        ValueError: The grids do not fit, the mask does not, or a side of the tile is not positive.
    """
    shape = (tile, tile) if isinstance(tile, int) else tile
    if min(shape) < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    check_key_mask(key_mask, k)
    (keys, values), counts = pool_tiles((k, v), check_grids(grids, k.shape[2]), shape, key_mask)
    return PooledLandmarks(keys.to(k.dtype), values.to(v.dtype), counts.log().expand(k.shape[0], -1))


def landmark_set(
    k: Tensor,
    v: Tensor,
    *,
    grids: Sequence[TokenGrid],
    tile: int | tuple[int, int],
    index: Tensor | None,
    key_mask: Tensor | None,
) -> PooledLandmarks:
    """Put the tokens outside the grids, chosen tokens and pooled tiles side by side as keys of one softmax.

    Args:
        k: ``[B, H, N, D]``.
        v: ``[B, H, N, Dv]``.
        grids: Grids of image tokens.
        tile: Size of the tiles.
        index: ``[M]`` int64, tokens that stay exact and leave their tile's means; none twice. One outside the grids is
            exact anyway and counts once.
        key_mask: ``[B, N]`` bool, True = keep.

    Returns:
        Keys, values and what is added to their scores: 0 for a token, ``-inf`` for one that is masked.
    """
    batch, length = k.shape[0], k.shape[2]
    ranges = exact_ranges(check_grids(grids, length), length)
    kept = torch.ones(batch, length, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    pooled_mask = key_mask
    places = [torch.arange(start, stop, device=k.device) for start, stop in ranges]
    present = [kept.index_select(1, place) for place in places]
    if index is not None:
        outside = torch.ones(length, dtype=torch.bool, device=k.device)
        for grid in grids:
            outside[grid.start : grid.stop] = False
        places.append(index)
        present.append(kept.index_select(1, index) & ~outside.index_select(0, index))
        pooled_mask = kept.index_fill(1, index, False)
    tiles = pooled_landmarks(k, v, grids=grids, tile=tile, key_mask=pooled_mask)
    if not places:
        return tiles
    place, keep = torch.cat(places), torch.cat(present, dim=1)
    bias = torch.zeros(keep.shape, dtype=tiles.log_count.dtype, device=k.device).masked_fill(~keep, -torch.inf)
    return PooledLandmarks(
        torch.cat([k.index_select(2, place), tiles.k], dim=2),
        torch.cat([v.index_select(2, place), tiles.v], dim=2),
        torch.cat([bias, tiles.log_count], dim=1),
    )
