"""Triton kernels that prepare near-far attention: means of tiles, far tiles worth keeping, lists of groups.

Rows of the table of tiles hold the tile's grid, its row and column of tiles, its first token, its rows and columns of
tokens, and the columns of tokens of its grid; rows of the table of groups the grid's first token, rows and columns of
tokens, the first tile's row and column, the grid's first tile, rows and columns of tiles (see ``fused_tables``).
"""

import triton
import triton.language as tl


@triton.jit
def mean_of_tiles(
    X, origin, extent_r, extent_c, columns, KEEP, stride_n,
    WIDTH: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Return the means over kept tokens, ``[BT, BW]``, and the numbers of kept tokens, ``[BT]``, of some tiles."""
    width = tl.arange(0, BLOCK_W)
    total, kept = tl.zeros((BLOCK_T, BLOCK_W), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for begin in range(0, TILE_R * TILE_C, BLOCK_S):
        slot = begin + tl.arange(0, BLOCK_S)
        row, column = slot // TILE_C, slot % TILE_C
        token = origin[:, None] + row[None, :] * columns[:, None] + column[None, :]  # [BT, BS]
        inside = (row[None, :] < extent_r[:, None]) & (column[None, :] < extent_c[:, None])
        if MASKED:
            inside &= tl.load(KEEP + token, mask=inside, other=0) != 0
        place = X + token.to(tl.int64)[:, :, None] * stride_n + width[None, None, :]
        x = tl.load(place, mask=inside[:, :, None] & (width < WIDTH)[None, None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 1)
        kept += tl.sum(inside.to(tl.float32), 1)
    return total / tl.maximum(kept, 1.0)[:, None], kept


@triton.jit
def near_far_pool_kernel(
    Q, K, V, KEEP, TILES, TEMPERATURE, BIAS, MEAN_Q, MEAN_K, POOLED_K, POOLED_V, POOLED_BIAS,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, length, tiles, unit,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, SELECT: tl.constexpr, CORRECTED: tl.constexpr, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pool ``BLOCK_T`` tiles of one head.

    Writes the means of keys (times the head's temperature) and values, the logarithm of the counts plus the head's
    bias in units of ``unit``, and with ``SELECT`` the means of queries and keys in float32.
    """
    blocks = tl.cdiv(tiles, BLOCK_T)
    sequence = tl.program_id(0) // blocks
    tile = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    real = tile < tiles
    fields = TILES + tile * 8
    origin = tl.load(fields + 3, mask=real, other=0)
    extent_r = tl.load(fields + 4, mask=real, other=0)
    extent_c = tl.load(fields + 5, mask=real, other=0)
    columns = tl.load(fields + 6, mask=real, other=0)
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    KEEP += batch * length
    row = sequence.to(tl.int64) * tiles + tile
    width, value_width = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    write = real[:, None] & (width < HEAD_DIM)[None, :]
    place = row[:, None] * HEAD_DIM + width[None, :]
    mean, kept = mean_of_tiles(
        K + batch * stride_kb + head * stride_kh, origin, extent_r, extent_c, columns, KEEP, stride_kn,
        HEAD_DIM, TILE_R, TILE_C, MASKED, BLOCK_T, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    bias = tl.where(kept > 0, tl.log2(tl.maximum(kept, 1.0)), float("-inf"))
    if SELECT:
        tl.store(MEAN_K + place, mean, mask=write)
    if CORRECTED:
        mean *= tl.load(TEMPERATURE + head).to(tl.float32)
        bias += tl.load(BIAS + head).to(tl.float32) * 1.4426950408889634
    tl.store(POOLED_K + place, mean.to(POOLED_K.dtype.element_ty), mask=write)
    tl.store(POOLED_BIAS + row, bias * unit, mask=real)
    mean, kept = mean_of_tiles(
        V + batch * stride_vb + head * stride_vh, origin, extent_r, extent_c, columns, KEEP, stride_vn,
        VALUE_DIM, TILE_R, TILE_C, MASKED, BLOCK_T, BLOCK_S, BLOCK_V,
    )  # fmt: skip
    value_place = row[:, None] * VALUE_DIM + value_width[None, :]
    write_value = real[:, None] & (value_width < VALUE_DIM)[None, :]
    tl.store(POOLED_V + value_place, mean.to(POOLED_V.dtype.element_ty), mask=write_value)
    if SELECT:
        mean, kept = mean_of_tiles(
            Q + batch * stride_qb + head * stride_qh, origin, extent_r, extent_c, columns, KEEP, stride_qn,
            HEAD_DIM, TILE_R, TILE_C, MASKED, BLOCK_T, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        tl.store(MEAN_Q + place, mean, mask=write)


@triton.jit
def near_far_select_kernel(
    MEAN_Q, MEAN_K, POOLED_BIAS, TILES, SELECTION, tiles, scale,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RADIUS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Choose for ``BLOCK_Q`` query tiles the ``TOP_K`` far tiles with tokens of the largest product of means.

    ``SELECTION`` is ``[B * H, T, TOP_K]`` int32, in no order; -1 where there are fewer. Block by block the best of the
    far tiles take the places of the worst that are held; a NaN takes no place.
    """
    blocks = tl.cdiv(tiles, BLOCK_Q)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    asker = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot, asks = tl.arange(0, SLOTS), asker < tiles
    grid = tl.load(TILES + asker * 8, mask=asks, other=-1)[:, None]
    row = tl.load(TILES + asker * 8 + 1, mask=asks, other=0)[:, None]
    column = tl.load(TILES + asker * 8 + 2, mask=asks, other=0)[:, None]
    best = tl.where(slot < TOP_K, float("-inf"), float("inf"))[None, :] + tl.zeros((BLOCK_Q, SLOTS), tl.float32)
    chosen = tl.full((BLOCK_Q, SLOTS), -1, tl.int32)
    local = tl.arange(0, BLOCK_T)
    for begin in range(0, tiles, BLOCK_T):
        tile = begin + local
        real = tile < tiles
        scores = tl.zeros((BLOCK_Q, BLOCK_T), tl.float32)
        for part in range(0, HEAD_DIM, BLOCK_D):
            width = part + tl.arange(0, BLOCK_D)
            read = (width < HEAD_DIM)[None, :]
            place = (sequence * tiles + asker)[:, None] * HEAD_DIM + width[None, :]
            q = tl.load(MEAN_Q + place, mask=asks[:, None] & read, other=0.0)
            place = (sequence * tiles + tile)[:, None] * HEAD_DIM + width[None, :]
            k = tl.load(MEAN_K + place, mask=real[:, None] & read, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        scores *= scale
        near = grid == tl.load(TILES + tile * 8, mask=real, other=-1)[None, :]
        near &= tl.abs(row - tl.load(TILES + tile * 8 + 1, mask=real, other=0)[None, :]) <= RADIUS
        near &= tl.abs(column - tl.load(TILES + tile * 8 + 2, mask=real, other=0)[None, :]) <= RADIUS
        bias = tl.load(POOLED_BIAS + sequence * tiles + tile, mask=real, other=float("-inf"))
        scores = tl.where(near | (bias == float("-inf"))[None, :], float("-inf"), scores)
        for _ in range(TOP_K):
            value = tl.max(scores, 1)
            # The first of equals.
            index = tl.min(tl.where(scores == value[:, None], local[None, :], BLOCK_T), 1)
            worst = tl.min(best, 1)
            held = tl.min(tl.where(best == worst[:, None], slot[None, :], SLOTS), 1)
            takes = (value > worst)[:, None] & (slot[None, :] == held[:, None])
            best = tl.where(takes, value[:, None], best)
            chosen = tl.where(takes, begin + index[:, None], chosen)
            scores = tl.where(local[None, :] == index[:, None], float("-inf"), scores)
    place = (sequence * tiles + asker)[:, None] * TOP_K + slot[None, :]
    tl.store(SELECTION + place, chosen, mask=asks[:, None] & (slot < TOP_K)[None, :])


@triton.jit
def near_far_plan_kernel(
    SELECTION, GROUPS, TILES, CHOSEN, CHOSEN_COUNT, tiles, groups,
    TOP_K: tl.constexpr, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr, RADIUS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Gather the tiles that members of a group have chosen, each once.

    ``CHOSEN`` is ``[B * H, G, 5, LIST]`` int32: tile, bits of the members that chose it, first token, columns of tokens
    of its grid, rows and columns of the tile (in the upper and lower half). A choice counts once, and not where the
    tile is near its member or does not exist. ``SELECTION`` is ``[B * H, T, TOP_K]``.
    """
    sequence, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    fields = GROUPS + group * 8
    tile_row, tile_column, first_tile = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    tile_rows, tile_columns = tl.load(fields + 6), tl.load(fields + 7)
    entry = tl.arange(0, LIST)
    member = entry // TOP_K
    row, column = tile_row + member // GROUP_C, tile_column + member % GROUP_C
    asks = (member < GROUP_R * GROUP_C) & (row < tile_rows) & (column < tile_columns)
    asker = sequence * tiles + first_tile + row * tile_columns + column
    tile = tl.load(SELECTION + asker * TOP_K + entry % TOP_K, mask=asks, other=-1).to(tl.int32)
    place = tile - first_tile
    near = (place >= 0) & (place < tile_rows * tile_columns)
    near &= tl.abs(place // tile_columns - row) <= RADIUS
    near &= tl.abs(place % tile_columns - column) <= RADIUS
    valid = (tile >= 0) & (tile < tiles) & (near == 0)
    tile = tl.where(valid, tile, -1)
    same = (tile[:, None] == tile[None, :]) & valid[:, None]  # [LIST, LIST]
    before = entry[None, :] < entry[:, None]
    repeated = tl.sum((same & before & (member[:, None] == member[None, :])).to(tl.int32), 1) > 0
    bit = tl.where(valid & (repeated == 0), 1 << member, 0)
    bits = tl.sum(tl.where(same, bit[None, :], 0), 1)
    first = (valid & (tl.sum((same & before).to(tl.int32), 1) == 0)).to(tl.int32)
    position = tl.sum(tl.where(before, first[None, :], 0), 1)
    write = first > 0
    target = CHOSEN + (tl.program_id(0).to(tl.int64) * 5 * LIST) + position
    tl.store(target, tile, mask=write)
    tl.store(target + LIST, bits, mask=write)
    tl.store(target + 2 * LIST, tl.load(TILES + tile * 8 + 3, mask=write, other=0), mask=write)
    tl.store(target + 3 * LIST, tl.load(TILES + tile * 8 + 6, mask=write, other=0), mask=write)
    extent_r = tl.load(TILES + tile * 8 + 4, mask=write, other=0)
    extent_c = tl.load(TILES + tile * 8 + 5, mask=write, other=0)
    tl.store(target + 4 * LIST, extent_r * 65536 + extent_c, mask=write)
    tl.store(CHOSEN_COUNT + tl.program_id(0), tl.sum(first))
