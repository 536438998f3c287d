"""Near-far attention in memory linear in the tokens, on any device.

A few heads at a time are brought into tile order, so a near or chosen tile is one contiguous row that a single
``index_select`` gathers. A block of query tiles then needs two small attentions: over the gathered tiles, and over the
tokens outside the grids with all pooled tiles, the gathered ones masked. The two are joined by their normalisers.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.grid import TokenGrid
from attn_kernels.near_far.order import from_tiles, to_tiles
from attn_kernels.near_far.tiles import NearFarConfig, NearFarCorrections, exact_ranges, near_tiles, tile_total
from attn_kernels.partial import Partial
from attn_kernels.softmax import attend_scores

_CPU_GROUP_BYTES = 4 << 20
"""Bytes of keys and values brought into tile order at a time."""
_CPU_BLOCK_BYTES = 5 << 20
"""Bytes of gathered keys and values held at a time: little enough to stay in a CPU's caches."""
_DEVICE_BYTES = 1 << 28
"""Both of these on an accelerator, where a block must be large enough to fill the device."""
_SCORES_AT_ONCE = 1 << 24
"""Elements of scores that queries outside every grid hold at a time."""


@dataclass(frozen=True)
class _Plan:
    """What all heads share.

    Attributes:
        grids: Grids of image tokens.
        config: What stays exact.
        scale: Score scale.
        outside: Ranges of tokens outside every grid.
        width: The wider of keys and values: the attention kernel wants them equal, and zero columns change nothing.
        dtype: Dtype of the computation.
    """

    grids: tuple[TokenGrid, ...]
    config: NearFarConfig
    scale: float
    outside: tuple[tuple[int, int], ...]
    width: int
    dtype: torch.dtype

    def widen(self, x: Tensor) -> Tensor:
        """Append zero columns up to ``width``."""
        return F.pad(x, (0, self.width - x.shape[-1])) if x.shape[-1] < self.width else x


@dataclass(frozen=True, eq=False)
class _Tiled:
    """Some heads in tile order; T tiles of S tokens, E tokens outside every grid, W columns.

    Attributes:
        queries: ``[H, T, S, W]``.
        keys_values: ``[H, T + 1, S, 2 W]``, a key beside its value; the last tile is empty.
        bias: ``[T + 1, S]``, added to the scores of these keys: 0, or ``-inf`` where there is no unmasked token.
        far: ``[H, E + T, 2 W]``: the tokens outside every grid, then the pooled tiles.
        far_bias: ``[H, E + T]``, added to the scores of these keys.
    """

    queries: Tensor
    keys_values: Tensor
    bias: Tensor
    far: Tensor
    far_bias: Tensor


def near_far_blocked(
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
) -> Partial:
    """Compute near-far attention block by block, without gradient; half precision is computed in float32.

    Arguments as in ``near_far_attention``, checked and resolved; ``selection`` names no near tile and no tile twice,
    and is ``None`` only if ``top_k`` is 0.

    Returns:
        ``Partial`` with ``out`` ``[B, H, N, Dv]`` in the dtype of ``v``.
    """
    batch, heads, length, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    plan = _Plan(grids, config, scale, exact_ranges(grids, length), max(q.shape[-1], v.shape[-1]), dtype)
    out = v.new_empty(batch, heads, length, v.shape[-1])
    lse = q.new_empty(batch, heads, length, dtype=dtype)
    with torch.no_grad():
        near = near_tiles(grids, config.tile_shape, config.radius, q.device)
        group_bytes = _CPU_GROUP_BYTES if q.device.type == "cpu" else _DEVICE_BYTES
        step = max(1, group_bytes // (2 * length * plan.width * dtype.itemsize))
        for row, first in product(range(batch), range(0, heads, step)):
            some = slice(first, min(first + step, heads))
            part = None if corrections is None else NearFarCorrections(*(each[some].to(dtype) for each in corrections))
            mask = None if key_mask is None else key_mask[row]
            tiled = _tile_heads(q[row, some], k[row, some], v[row, some], mask, part, plan)
            expanded = near.expand(some.stop - some.start, -1, -1)
            if selection is not None:
                chosen = selection[row, some]
                expanded = torch.cat([expanded, torch.where(chosen < 0, near.shape[0], chosen)], dim=-1)
            _attend_grids(tiled, expanded, plan, out[row, some], lse[row, some])
            for start, stop in plan.outside:
                answer = _attend_outside(q[row, some, start:stop], k[row, some], v[row, some], mask, tiled, plan)
                out[row, some, start:stop] = answer.out[..., : v.shape[-1]]
                lse[row, some, start:stop] = answer.lse
    return Partial(out, lse)


def _tile_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    corrections: NearFarCorrections | None,
    plan: _Plan,
) -> _Tiled:
    """Bring heads ``[H, N, D]`` with key mask ``[N]`` into tile order and pool their tiles."""
    heads, length, _ = q.shape
    shape, width = plan.config.tile_shape, plan.width
    tiles, size = tile_total(plan.grids, shape), shape[0] * shape[1]
    q, k, v = plan.widen(q), plan.widen(k), plan.widen(v)
    kept = q.new_ones(1, length, 1, dtype=plan.dtype) if key_mask is None else key_mask.to(plan.dtype)[None, :, None]

    queries = q.new_empty(heads, tiles, size, width, dtype=plan.dtype)
    keys_values = q.new_empty(heads, tiles + 1, size, 2 * width, dtype=plan.dtype)
    present = kept.new_zeros(1, tiles + 1, size, 1)
    keys_values[:, tiles] = 0
    to_tiles(q, plan.grids, shape, queries)
    to_tiles(k, plan.grids, shape, keys_values[..., :width])
    to_tiles(v, plan.grids, shape, keys_values[..., width:])
    to_tiles(kept, plan.grids, shape, present)

    counts = present[0, :tiles, :, 0].sum(dim=-1)
    members = keys_values[:, :tiles]
    if key_mask is not None:
        members = torch.where(present[:, :tiles] > 0, members, 0)
    pooled = members.sum(dim=2) / counts.clamp(min=1).unsqueeze(-1)
    pooled_bias = torch.log(counts).expand(heads, -1)
    if corrections is not None:
        pooled[..., :width] *= corrections.temperature[:, None, None]
        pooled_bias = pooled_bias + corrections.bias[:, None]
    exact = [torch.cat([k[:, start:stop], v[:, start:stop]], dim=-1).to(plan.dtype) for start, stop in plan.outside]
    exact_bias = [torch.log(kept[..., 0])[:, start:stop].expand(heads, -1) for start, stop in plan.outside]
    return _Tiled(
        queries=queries,
        keys_values=keys_values,
        bias=torch.log(present[0, ..., 0]),
        far=torch.cat([*exact, pooled], dim=1),
        far_bias=torch.cat([*exact_bias, pooled_bias], dim=1),
    )


def _attend_grids(tiled: _Tiled, expanded: Tensor, plan: _Plan, out: Tensor, lse: Tensor) -> None:
    """Answer all queries of the grids.

    Args:
        tiled: Heads in tile order; its queries are overwritten.
        expanded: ``[H, T, L]`` int64, the tiles that each query tile sees token by token; T = none.
        plan: What all heads share.
        out: ``[H, N, Dv]``, written at the places of the grids.
        lse: ``[H, N]``, written likewise.
    """
    # Answers take the place of the queries they answer, which nobody reads again.
    tile_out = tiled.queries
    tile_lse = tile_out.new_empty(tile_out.shape[:-1])
    blocks = _blocks(tiled, expanded.shape[-1])
    # One buffer for all blocks: touching fresh memory for each would cost as much as the gather.
    (heads, tiles), (_, _, size, width) = blocks[0], tiled.keys_values.shape
    rows = (heads.stop - heads.start) * (tiles.stop - tiles.start) * expanded.shape[-1]
    buffer = tiled.keys_values.new_empty(rows, size * width)
    for block in blocks:
        near = _attend_near(tiled, expanded, block, plan.scale, buffer)
        far = _attend_far(tiled, expanded, block, plan.scale)
        share = torch.sigmoid(far.lse - near.lse).masked_fill_(far.lse == -torch.inf, 0)
        torch.lerp(near.out, far.out, share.unsqueeze(-1), out=tile_out[block])
        torch.logaddexp(near.lse, far.lse, out=tile_lse[block])
    from_tiles(tile_out[..., : out.shape[-1]], plan.grids, plan.config.tile_shape, out)
    from_tiles(tile_lse.unsqueeze(-1), plan.grids, plan.config.tile_shape, lse.unsqueeze(-1))


def _blocks(tiled: _Tiled, expanded: int) -> list[tuple[slice, slice]]:
    """Cut heads and query tiles into blocks whose gathered keys and values fit the block size, the largest first."""
    heads, tiles, size, _ = tiled.queries.shape
    tile_bytes = expanded * size * tiled.keys_values.shape[-1] * tiled.keys_values.itemsize
    room = max(1, (_CPU_BLOCK_BYTES if tiled.queries.device.type == "cpu" else _DEVICE_BYTES) // tile_bytes)
    heads_step, tiles_step = max(1, room // tiles), min(room, tiles)
    return [
        (slice(head, min(head + heads_step, heads)), slice(tile, min(tile + tiles_step, tiles)))
        for head, tile in product(range(0, heads, heads_step), range(0, tiles, tiles_step))
    ]


def _attend_near(tiled: _Tiled, expanded: Tensor, block: tuple[slice, slice], scale: float, buffer: Tensor) -> Partial:
    """Attend from a block of query tiles to the tokens of their expanded tiles, gathered into ``buffer``."""
    tiles = expanded[block]
    total, size, width = tiled.keys_values.shape[1:]
    first_rows = torch.arange(block[0].start, block[0].stop, device=tiles.device)[:, None, None] * total
    rows = (tiles + first_rows).flatten()
    gathered = buffer[: len(rows)]
    torch.index_select(tiled.keys_values.view(-1, size * width), 0, rows, out=gathered)
    gathered = gathered.view(*tiles.shape[:2], -1, width)
    bias = tiled.bias.index_select(0, tiles.flatten()).view(*tiles.shape[:2], 1, -1)
    keys, values = gathered.chunk(2, dim=-1)
    return _attend(tiled.queries[block], keys, values, bias, scale)


def _attend_far(tiled: _Tiled, expanded: Tensor, block: tuple[slice, slice], scale: float) -> Partial:
    """Attend from a block of query tiles to the tokens outside every grid and to the tiles that are not expanded."""
    tiles = expanded[block]
    count = tiled.far.shape[1]
    # The tile that does not exist gets the last column to itself.
    bias = tiled.far_bias.new_empty(*tiles.shape[:2], count + 1)
    bias[..., :count] = tiled.far_bias[block[0], None]
    bias.scatter_(-1, tiles + (count - tiled.keys_values.shape[1] + 1), -torch.inf)
    keys, values = tiled.far[block[0], None].expand(*tiles.shape[:2], -1, -1).chunk(2, dim=-1)
    return _attend(tiled.queries[block], keys, values, bias[..., None, :count], scale)


def _attend_outside(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, tiled: _Tiled, plan: _Plan) -> Partial:
    """Attend from queries outside every grid, as the configuration says.

    Args:
        q: ``[H, n, D]``.
        k: ``[H, N, D]``.
        v: ``[H, N, Dv]``.
        key_mask: ``[N]`` bool or ``None``.
        tiled: The same heads in tile order.
        plan: What all heads share.

    Returns:
        ``Partial`` with ``out`` ``[H, n, W]``.
    """
    if plan.config.exact_queries == "exact":
        keys, values = plan.widen(k).to(plan.dtype), plan.widen(v).to(plan.dtype)
        bias = q.new_zeros(k.shape[1], dtype=plan.dtype).expand(len(q), -1)
        if key_mask is not None:
            bias = bias.masked_fill(~key_mask, -torch.inf)
    else:
        (keys, values), bias = tiled.far.chunk(2, dim=-1), tiled.far_bias
    queries = plan.widen(q).to(plan.dtype)[:, None]
    step = max(1, _SCORES_AT_ONCE // (bias.shape[0] * bias.shape[1]))
    parts = [
        _attend(queries[:, :, first : first + step], keys[:, None], values[:, None], bias[:, None, None], plan.scale)
        for first in range(0, q.shape[1], step)
    ]
    return Partial(torch.cat([part.out[:, 0] for part in parts], 1), torch.cat([part.lse[:, 0] for part in parts], 1))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Partial:
    """Attend exactly to a few keys.

    Args:
        queries: ``[P, C, n, W]``.
        keys: ``[P, C, m, W]``.
        values: ``[P, C, m, W]``.
        bias: ``[P, C, 1, m]``, added to the scores; ``-inf`` removes a key.
        scale: Score scale.

    Returns:
        ``Partial`` with ``out`` ``[P, C, n, W]``; zeros and ``-inf`` where the bias removes every key.
    """
    if not _has_flash(queries):
        return attend_scores(torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale).add_(bias), values)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(queries, keys, values, attn_mask=bias, scale=scale)
    # The kernel answers a query without keys with zeros, but with the normaliser of one key of score 0.
    return Partial(out, lse.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf))


def _has_flash(queries: Tensor) -> bool:
    """Tell whether torch has a fused attention here that takes a bias and answers the normaliser too."""
    return queries.device.type == "cpu"
