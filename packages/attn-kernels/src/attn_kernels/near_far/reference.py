"""Near-far attention as one masked softmax over all keys and all pooled tiles: the specification."""

import torch
from torch import Tensor

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import NearFarConfig, NearFarCorrections, pool_tiles, tile_counts
from attn_kernels.partial import Partial
from attn_kernels.softmax import attend_scores


def near_far_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: tuple[TokenGrid, ...],
    config: NearFarConfig,
    scale: float,
    key_mask: Tensor | None,
    corrections: NearFarCorrections | None,
    selection: Tensor | None,
    query_positions: Tensor | None,
) -> Partial:
    """Compute near-far attention in quadratic memory, differentiable in q, k, v and the corrections.

    Arguments as in ``near_far_attention``, checked and resolved; ``selection`` is ``None`` only if ``top_k`` is 0.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(wide), k.to(wide), v.to(wide)
    tile_of, place = _tiles_of_tokens(grids, k.shape[2], config.tile_shape, k.device)
    apart = (place[:, None] - place).abs()
    near = (apart[..., 0] == 0) & (apart[..., 1:].amax(dim=-1) <= config.radius)
    query_tile = tile_of if query_positions is None else tile_of[query_positions]
    expanded = _expanded_tiles(near, selection, query_tile, config)

    scores = scale * (queries @ keys.transpose(-1, -2))  # [B, H, Nq, Nk]
    visible = (tile_of < 0) | expanded[..., tile_of.clamp(min=0)]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    scores = scores.masked_fill(~visible, -torch.inf)

    (mean_keys, mean_values), counts = pool_tiles([keys, values], grids, config.tile_shape, key_mask)
    pooled = scale * (queries @ mean_keys.transpose(-1, -2))  # [B, H, Nq, T]
    if corrections is not None:
        temperature, bias = (part.to(wide)[:, None, None] for part in corrections)
        pooled = temperature * pooled + bias
    pooled = (pooled + torch.log(counts)[:, None, None, :]).masked_fill(expanded, -torch.inf)

    part = attend_scores(torch.cat([scores, pooled], dim=-1), torch.cat([values, mean_values], dim=2))
    return Partial(part.out.to(v.dtype), part.lse)


def _tiles_of_tokens(
    grids: tuple[TokenGrid, ...], length: int, tile_shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Number the tiles grid after grid, each in raster order.

    Returns:
        ``[N]`` int64, the tile of each token, -1 outside every grid; ``[T, 3]`` int64, the grid, tile row and tile
        column of each tile.
    """
    tile_of = torch.full((length,), -1, device=device)
    places, first = [], 0
    for index, grid in enumerate(grids):
        rows, columns = tile_counts(grid, tile_shape)
        row = torch.arange(grid.rows, device=device) // tile_shape[0]
        column = torch.arange(grid.columns, device=device) // tile_shape[1]
        tile_of[grid.start : grid.stop] = (first + row[:, None] * columns + column).flatten()
        axes = (torch.full((1,), index), torch.arange(rows), torch.arange(columns))
        places.append(torch.cartesian_prod(*axes).to(device))
        first += rows * columns
    return tile_of, torch.cat(places)


def _expanded_tiles(near: Tensor, selection: Tensor | None, tile_of: Tensor, config: NearFarConfig) -> Tensor:
    """Return which tiles a query sees token by token, broadcastable to ``[B, H, Nq, T]`` bool.

    Args:
        near: ``[T, T]`` bool.
        selection: ``[B, H, T, top_k]`` int64 or ``None``.
        tile_of: ``[Nq]`` int64, the tile of each query, -1 outside every grid.
        config: Decides what queries outside every grid see.
    """
    expanded = near[None, None]
    if selection is not None:
        tiles = near.shape[-1]
        chosen = near.new_zeros(*selection.shape[:3], tiles + 1)
        chosen = chosen.scatter(-1, torch.where(selection < 0, tiles, selection), True)
        expanded = expanded | chosen[..., :tiles]
    of_query = expanded[:, :, tile_of.clamp(min=0)]
    outside = (tile_of < 0)[:, None]
    return of_query | outside if config.exact_queries == "exact" else of_query & ~outside
