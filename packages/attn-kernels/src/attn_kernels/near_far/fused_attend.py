"""The block-sparse flash kernel of near-far attention.

A program answers ``BLOCK_M`` queries of one head: a group of neighbouring tiles, or tokens outside every grid. Its keys
come in four runs, each a pipelined loop over blocks of ``BLOCK_N`` keys under one online softmax: ranges of tokens
(those outside the grids, or all), the rectangle of tokens around the group, the tiles chosen by members of the group,
and the pooled tiles. A key of the last three runs carries one bit per tile of the group, set where that tile may see
it, and a query carries the bit of its own tile; so tiles of a group share every load and still see their own keys.

Tokens are read and written where they lie: a key's place follows from the group's row and column.
"""

import triton
import triton.language as tl

from attn_kernels.fused import mma_operand


@triton.jit
def bits_of(seen, member):
    """Pack ``seen`` ``[BN, members]`` into ``[BN]`` bits.

    One axis of members and a sum over it: the compiler deals this small table out to the threads once, where it would
    repeat a chain of operations on ``[BN]`` in every thread that holds a score of that key.
    """
    return tl.sum(tl.where(seen, 1 << member, 0), 1)


@triton.jit
def near_bits(row, column, inside, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr, RADIUS: tl.constexpr):
    """Return ``[BN]`` bits of the group's tiles that lie within ``RADIUS`` of a tile, 0 where not ``inside``.

    ``row`` and ``column`` ``[BN]`` count tiles from the group's first.
    """
    member = tl.arange(0, triton.next_power_of_2(GROUP_R * GROUP_C))[None, :]
    near = tl.abs(row[:, None] - member // GROUP_C) <= RADIUS
    near &= tl.abs(column[:, None] - member % GROUP_C) <= RADIUS
    return bits_of(near & inside[:, None] & (member < GROUP_R * GROUP_C), member)


@triton.jit
def attend_block(
    peak, total, acc, q, K, V, stride_kn, stride_vn, token, inside, bits, own, bias, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BIASED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to a running softmax in base 2.

    ``token`` ``[BN]`` are rows of ``K`` and ``V``, read where ``inside``; a query with bits ``own`` ``[BM]`` sees the
    keys whose ``bits`` ``[BN]`` it shares; ``bias`` ``[BN]`` is in units of the products ``q . k``.
    """
    width, value_width = tl.arange(0, q.shape[1]), tl.arange(0, acc.shape[1])
    at, read, read_value = token.to(tl.int64)[:, None], inside[:, None], inside[:, None]
    if q.shape[1] != HEAD_DIM:
        read &= (width < HEAD_DIM)[None, :]
    if acc.shape[1] != VALUE_DIM:
        read_value &= (value_width < VALUE_DIM)[None, :]
    k = tl.load(K + at * stride_kn + width[None, :], mask=read, other=0.0)  # [BN, BD]
    k = mma_operand(k, K.dtype.element_ty, INTERPRET)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    if BIASED:
        scores += bias[None, :]
    scores = tl.where((bits[None, :] & own[:, None]) != 0, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    v = tl.load(V + at * stride_vn + value_width[None, :], mask=read_value, other=0.0)  # [BN, BV]
    v = mma_operand(v, V.dtype.element_ty, INTERPRET)
    weights = mma_operand(weights, V.dtype.element_ty, INTERPRET)
    acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def keep_tokens(KEEP, token, inside, MASKED: tl.constexpr):
    """Narrow ``inside`` to the tokens that the key mask keeps; ``KEEP`` is the row of this batch."""
    if MASKED:
        inside &= tl.load(KEEP + token, mask=inside, other=0) != 0
    return inside


@triton.jit
def attend_ranges(
    peak, total, acc, q, K, V, KEEP, RANGES, stride_kn, stride_vn, own, scale, first, last,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend to the tokens of ``RANGES[first:last]``, pairs (start, stop) of at most ``BLOCK_N`` tokens.

    One flat loop over short ranges: with a loop over ranges around it, ptxas waits for each matrix instruction.
    """
    for index in tl.range(first, last, num_stages=STAGES):
        start, stop = tl.load(RANGES + 2 * index), tl.load(RANGES + 2 * index + 1)
        token = start + tl.arange(0, BLOCK_N)
        inside = keep_tokens(KEEP, token, token < stop, MASKED)
        bits = tl.where(inside, -1, 0)
        peak, total, acc = attend_block(
            peak, total, acc, q, K, V, stride_kn, stride_vn, token, inside, bits, own, 0.0, scale,
            HEAD_DIM, VALUE_DIM, False, INTERPRET,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def attend_near(
    peak, total, acc, q, K, V, KEEP, stride_kn, stride_vn, own, scale,
    start, rows, columns, tile_row, tile_column,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr, RADIUS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend to the rectangle of tokens within ``RADIUS`` tiles of the group; rows beyond the grid are not visited."""
    WIDTH: tl.constexpr = (GROUP_C + 2 * RADIUS) * TILE_C
    first_row = tl.maximum((tile_row - RADIUS) * TILE_R, 0)
    last_row = tl.minimum((tile_row + GROUP_R + RADIUS) * TILE_R, rows)
    first_column, count = (tile_column - RADIUS) * TILE_C, (last_row - first_row) * WIDTH
    for begin in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        place = begin + tl.arange(0, BLOCK_N)
        row, column = first_row + place // WIDTH, first_column + place % WIDTH
        token = start + row * columns + column
        inside = (place < count) & (column >= 0) & (column < columns)
        inside = keep_tokens(KEEP, token, inside, MASKED)
        bits = near_bits(row // TILE_R - tile_row, place % WIDTH // TILE_C - RADIUS, inside, GROUP_R, GROUP_C, RADIUS)
        peak, total, acc = attend_block(
            peak, total, acc, q, K, V, stride_kn, stride_vn, token, inside, bits, own, 0.0, scale,
            HEAD_DIM, VALUE_DIM, False, INTERPRET,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def attend_chosen(
    peak, total, acc, q, K, V, KEEP, CHOSEN, stride_kn, stride_vn, own, scale, chosen,
    MEMBERS: tl.constexpr, TILE_C: tl.constexpr, TILE_TOKENS: tl.constexpr, LIST: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend to the ``chosen`` tiles of the group's list, whose fields lie ``LIST`` apart; see ``near_far_plan``."""
    count = chosen * TILE_TOKENS
    for begin in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        place = begin + tl.arange(0, BLOCK_N)
        if TILE_TOKENS % BLOCK_N == 0:
            entry, slot, listed = begin // TILE_TOKENS, begin % TILE_TOKENS + tl.arange(0, BLOCK_N), begin < count
        else:
            entry, slot, listed = place // TILE_TOKENS, place % TILE_TOKENS, place < count
        bits = tl.load(CHOSEN + LIST + entry, mask=listed, other=0)
        origin = tl.load(CHOSEN + 2 * LIST + entry, mask=listed, other=0)
        columns = tl.load(CHOSEN + 3 * LIST + entry, mask=listed, other=0)
        extent = tl.load(CHOSEN + 4 * LIST + entry, mask=listed, other=0)
        row, column = slot // TILE_C, slot % TILE_C
        token = origin + row * columns + column
        inside = (place < count) & (row < extent >> 16) & (column < (extent & 0xFFFF))
        inside = keep_tokens(KEEP, token, inside, MASKED)
        member = tl.arange(0, triton.next_power_of_2(MEMBERS))[None, :]
        bits = bits_of(((tl.where(inside, bits, 0)[:, None] >> member) & 1) != 0, member)
        peak, total, acc = attend_block(
            peak, total, acc, q, K, V, stride_kn, stride_vn, token, inside, bits, own, 0.0, scale,
            HEAD_DIM, VALUE_DIM, False, INTERPRET,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def attend_pooled(
    peak, total, acc, q, POOLED_K, POOLED_V, POOLED_BIAS, CHOSEN, own, scale, tiles, chosen,
    first_tile, tile_rows, tile_columns, tile_row, tile_column,
    GROUP_R: tl.constexpr, GROUP_C: tl.constexpr, RADIUS: tl.constexpr, LIST: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend to the pooled tiles; a tile of the group does not see those that it has met token by token."""
    if LIST > 0:
        entry = tl.arange(0, LIST)
        listed = tl.load(CHOSEN + entry, mask=entry < chosen, other=-1)
        listed_bits = tl.load(CHOSEN + LIST + entry, mask=entry < chosen, other=0)
    for begin in tl.range(0, tiles, BLOCK_N, num_stages=STAGES):
        tile = begin + tl.arange(0, BLOCK_N)
        place = tile - first_tile
        met = near_bits(
            place // tile_columns - tile_row, place % tile_columns - tile_column,
            (place >= 0) & (place < tile_rows * tile_columns), GROUP_R, GROUP_C, RADIUS,
        )  # fmt: skip
        if LIST > 0:
            met |= tl.sum(tl.where(tile[:, None] == listed[None, :], listed_bits[None, :], 0), 1)
        inside = tile < tiles
        bias = tl.load(POOLED_BIAS + tile, mask=inside, other=float("-inf"))
        peak, total, acc = attend_block(
            peak, total, acc, q, POOLED_K, POOLED_V, HEAD_DIM, VALUE_DIM, tile, inside, ~met, own,
            bias, scale, HEAD_DIM, VALUE_DIM, True, INTERPRET,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def queries_of_group(
    GROUPS, group, slot,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    """Return tokens, presence and bits of some slots of a group, and where the group and its grid lie."""
    fields = GROUPS + group * 8
    start, rows, columns = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    tile_row, tile_column, first_tile = tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5)
    row, column = slot // (GROUP_C * TILE_C), slot % (GROUP_C * TILE_C)
    own = 1 << (row // TILE_R * GROUP_C + column // TILE_C)
    row, column = tile_row * TILE_R + row, tile_column * TILE_C + column
    asked = (slot < GROUP_R * TILE_R * GROUP_C * TILE_C) & (row < rows) & (column < columns)
    token, own = start + row * columns + column, tl.where(asked, own, 0)
    return (
        token, asked, own, start, rows, columns, tile_row, tile_column,
        first_tile, tl.load(fields + 6), tl.load(fields + 7),
    )  # fmt: skip


@triton.jit
def write_answers(OUT, LSE, row, asked, peak, total, acc, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """Normalise and store the answers of some rows; a query without keys gets zeros and ``-inf``."""
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(divisor)) * 0.6931471805599453)
    width, out = tl.arange(0, BLOCK_V), acc / divisor[:, None]
    tl.store(LSE + row, lse, mask=asked)
    place = row[:, None] * VALUE_DIM + width[None, :]
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=asked[:, None] & (width < VALUE_DIM)[None, :])


@triton.jit
def load_queries(
    Q, token, asked, stride_qn, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Load queries as operands of a product; turned round for a negative scale, which costs no rounding."""
    width = tl.arange(0, BLOCK_D)
    place = Q + token.to(tl.int64)[:, None] * stride_qn + width[None, :]
    q = tl.load(place, mask=asked[:, None] & (width < HEAD_DIM)[None, :], other=0.0)
    if NEGATIVE:
        q = -q.to(tl.float32)
    return mma_operand(q, DTYPE, INTERPRET)


@triton.jit
def near_far_fwd_kernel(
    Q, K, V, KEEP, POOLED_K, POOLED_V, POOLED_BIAS, RANGES, OUTSIDE, GROUPS, CHOSEN, CHOSEN_COUNT, OUT, LSE,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    sequences, heads, length, tiles, groups, outside, all_ranges, ranges, scale,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, GROUP_R: tl.constexpr, GROUP_C: tl.constexpr, RADIUS: tl.constexpr,
    LIST: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Answer ``BLOCK_M`` queries: program after program the tokens outside the grids, then the groups of tiles."""
    program, slot = tl.program_id(0), tl.arange(0, BLOCK_M)
    dense = tl.cdiv(outside, BLOCK_M)
    if program < dense * sequences:
        sequence, slot = program // dense, program % dense * BLOCK_M + slot
        asked, own = slot < outside, tl.full((BLOCK_M,), 1, tl.int32)
        token = tl.load(OUTSIDE + slot, mask=asked, other=0)
        start, rows, columns, first_tile, tile_rows, tile_columns = 0, 0, 1, 0, 0, 1
        tile_row, tile_column, chosen, group = -RADIUS - GROUP_R, 0, 0, 0
        first_range, last_range, pooled = all_ranges, ranges, tiles
        if EXACT:
            first_range, last_range, pooled = 0, all_ranges, 0
    else:
        rest = program - dense * sequences
        sequence, part, group = rest // (groups * PARTS), rest % PARTS, rest // PARTS % groups
        (token, asked, own, start, rows, columns, tile_row, tile_column, first_tile, tile_rows, tile_columns) = (
            queries_of_group(GROUPS, group, part * BLOCK_M + slot, TILE_R, TILE_C, GROUP_R, GROUP_C)
        )
        first_range, last_range, pooled, chosen = all_ranges, ranges, tiles, 0
        if LIST > 0:
            chosen = tl.load(CHOSEN_COUNT + sequence.to(tl.int64) * groups + group)
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    sequence = sequence.to(tl.int64)
    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    KEEP += batch * length
    CHOSEN += (sequence * groups + group) * (5 * LIST)
    Q += batch * stride_qb + head * stride_qh
    q = load_queries(Q, token, asked, stride_qn, K.dtype.element_ty, HEAD_DIM, BLOCK_D, NEGATIVE, INTERPRET)
    # Finite, so that a query that has met no key yet shifts its scores of -inf by a number.
    peak, total = tl.full((BLOCK_M,), -1.0e30, tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    peak, total, acc = attend_ranges(
        peak, total, acc, q, K, V, KEEP, RANGES, stride_kn, stride_vn, own, scale, first_range, last_range,
        HEAD_DIM, VALUE_DIM, MASKED, BLOCK_N, STAGES, INTERPRET,
    )  # fmt: skip
    peak, total, acc = attend_near(
        peak, total, acc, q, K, V, KEEP, stride_kn, stride_vn, own, scale, start, rows, columns, tile_row, tile_column,
        TILE_R, TILE_C, GROUP_R, GROUP_C, RADIUS, HEAD_DIM, VALUE_DIM, MASKED, BLOCK_N, STAGES, INTERPRET,
    )  # fmt: skip
    if LIST > 0:
        peak, total, acc = attend_chosen(
            peak, total, acc, q, K, V, KEEP, CHOSEN, stride_kn, stride_vn, own, scale, chosen,
            GROUP_R * GROUP_C, TILE_C, TILE_R * TILE_C, LIST, HEAD_DIM, VALUE_DIM, MASKED, BLOCK_N, STAGES, INTERPRET,
        )  # fmt: skip
    peak, total, acc = attend_pooled(
        peak, total, acc, q, POOLED_K + sequence * tiles * HEAD_DIM, POOLED_V + sequence * tiles * VALUE_DIM,
        POOLED_BIAS + sequence * tiles, CHOSEN, own, scale, pooled, chosen,
        first_tile, tile_rows, tile_columns, tile_row, tile_column,
        GROUP_R, GROUP_C, RADIUS, LIST, HEAD_DIM, VALUE_DIM, BLOCK_N, STAGES, INTERPRET,
    )  # fmt: skip
    write_answers(OUT, LSE, sequence * length + token, asked, peak, total, acc, VALUE_DIM, BLOCK_V)
