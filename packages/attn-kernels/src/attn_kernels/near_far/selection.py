"""Which far tiles stay exact: those whose pooled key scores highest against the mean query of the tile."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.tiles import NearFarConfig, check_grids, near_tiles, pool_tiles

_SCORES_AT_ONCE = 1 << 22
"""Elements of the score block held at a time."""


def select_tiles(
    q: Tensor,
    k: Tensor,
    *,
    grids: Sequence[TokenGrid],
    config: NearFarConfig,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Choose the ``config.top_k`` far tiles of each head and query tile.

    A far tile is scored by ``scale * mean query of the query tile . mean key of the far tile``, means over unmasked
    tokens. Never chosen: near tiles, and tiles without an unmasked token. Not differentiable.

    Args:
        q: ``[B, H, N, D]``, after RoPE; the queries of all tokens.
        k: ``[B, H, N, D]``, after RoPE.
        grids: Grids of image tokens.
        config: Tile, radius and ``top_k``.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, N]`` bool, True = keep.

    Returns:
        ``[B, H, T, top_k]`` int64, best first; -1 where fewer than ``top_k`` far tiles have tokens.

    Raises:
        ValueError: Shapes, grids or mask do not fit.
    """
    check_qkv(q, k, k)
    check_key_mask(key_mask, k)
    grids = check_grids(grids, k.shape[2])
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"select_tiles needs the queries of all {k.shape[2]} tokens, got q {tuple(q.shape)}")
    with torch.no_grad():
        (mean_q, mean_k), counts = pool_tiles([q, k], grids, config.tile_shape, key_mask)
        return choose_tiles(mean_q * resolve_scale(scale, q.shape[-1]), mean_k, counts, grids, config)


def choose_tiles(
    mean_q: Tensor, mean_k: Tensor, counts: Tensor, grids: Sequence[TokenGrid], config: NearFarConfig
) -> Tensor:
    """Choose tiles from pooled queries and keys; see ``select_tiles``.

    Args:
        mean_q: ``[B, H, T, D]``, scaled.
        mean_k: ``[B, H, T, D]``.
        counts: ``[B, T]`` or ``[1, T]``, unmasked tokens of each tile.
        grids: Grids of image tokens.
        config: Tile, radius and ``top_k``.

    Returns:
        ``[B, H, T, top_k]`` int64.
    """
    batch, heads, tiles, _ = mean_k.shape
    kept = min(config.top_k, tiles)
    chosen = torch.full((batch, heads, tiles, config.top_k), -1, dtype=torch.int64, device=mean_k.device)
    if kept == 0:
        return chosen
    near = near_tiles(grids, config.tile_shape, config.radius, mean_k.device)
    # The tile T, which does not exist, is a column of its own; with the near tiles it leaves the choice.
    keys = F.pad(mean_k, (0, 0, 0, 1)).transpose(-1, -2)
    absent = F.pad(counts == 0, (0, 1), value=True)[:, None, None, :]
    step = max(1, _SCORES_AT_ONCE // (batch * heads * tiles))
    for first in range(0, tiles, step):
        scores = mean_q[:, :, first : first + step] @ keys
        scores.scatter_(-1, near[first : first + step].expand(batch, heads, -1, -1), -torch.inf)
        best = scores.masked_fill_(absent, -torch.inf).topk(kept, dim=-1)
        chosen[:, :, first : first + step, :kept] = torch.where(best.values == -torch.inf, -1, best.indices)
    return chosen


def drop_repeats(selection: Tensor, near: Tensor) -> Tensor:
    """Replace by -1 every chosen tile that is near its query tile or was already named, so no key counts twice.

    Args:
        selection: ``[B, H, T, top_k]`` int64, chosen tiles.
        near: ``[T, W]`` int64, near tiles as ``near_tiles`` lists them.

    Returns:
        ``[B, H, T, top_k]`` int64.
    """
    repeated = (selection.unsqueeze(-1) == selection.unsqueeze(-2)).tril(-1).amax(dim=-1)
    is_near = (selection.unsqueeze(-1) == near.unsqueeze(-2)).amax(dim=-1)
    return torch.where(repeated | is_near, -1, selection)
