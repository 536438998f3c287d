"""The Triton kernels of window attention: flash attention that visits only the key blocks near by.

One program answers a block of queries: consecutive ones in 1-D, a rectangle of a grid in 2-D. Both keep the running
maximum, the sum and the output of an online softmax in float32 (Dao 2023, "FlashAttention-2", algorithm 1) and go
over two sets of keys: those that every query sees (prefix, tokens outside the grids), without a test per pair, then
those around the block, tested pair by pair.

A program of n queries in 1-D meets ``n + 2 window + prefix`` keys, of which a query needs ``2 window + 1 + prefix``; a
rectangle of r x c queries in 2-D meets ``(r + 2 radius)(c + 2 radius)`` keys besides those outside, of which a query
needs ``(2 radius + 1)^2``: 38 % of them at 8 x 16 queries and radius 8, 57 % at radius 16.

With ``TERMS`` the keys that a query does not see count as well, through a series of that many terms in few coordinates
(hybrid attention). Its sums over *all* keys begin the softmax, at the factor ``exp(offset)`` of the query, and every
pair that is seen adds ``exp(score)`` less what the series says of it, so each key counts once under one denominator.
"""

# Device functions have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl

from attn_kernels.fused import mma_operand


@triton.jit
def _said(
    scores, shift, low, offset, KLOW, KWEIGHT, places, present, pitch, share,
    RANK: tl.constexpr, BR: tl.constexpr, TERMS: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return ``[BM, BN]`` what the series says of a block of pairs, below ``shift``; arguments as in ``_attend``."""
    rr = tl.arange(0, BR)
    here = (rr < RANK)[:, None] & present[None, :]
    coordinates = tl.load(KLOW + (rr + 1)[:, None] * pitch + places[None, :], mask=here, other=0.0)
    residual = tl.dot(low, mma_operand(coordinates.to(tl.float32), DTYPE, INTERPRET), input_precision="ieee")
    series = tl.zeros_like(scores) + 1.0
    for step in tl.static_range(TERMS - 1):
        series = 1.0 + series * residual / (TERMS - 1 - step)
    weight = share * tl.load(KWEIGHT + places, mask=present, other=0.0)
    return series * (tl.exp2(offset - shift)[:, None] * weight[None, :])


@triton.jit
def _attend(
    acc, peak, total, q, low, offset, K, V, MASK, KLOW, KWEIGHT, places, present, seen, stride_kn, stride_vn, pitch,
    scale_log2, share, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, RANK: tl.constexpr,
    BR: tl.constexpr, TERMS: tl.constexpr, TESTED: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Join one block of keys to the running softmax.

    ``places`` ``[BN]`` are rows of K and V, ``present`` ``[BN]`` says which of them exist, ``seen`` ``[BM, BN]`` which
    pairs count where ``TESTED``. Returns the new ``acc`` ``[BM, BDV]``, ``peak`` ``[BM]`` (base 2), ``total`` ``[BM]``.

    With ``TERMS``: ``low`` ``[BM, BR]`` operand, ``offset`` ``[BM]`` (base 2), KLOW ``[RANK + 1, pitch]`` coordinates
    behind a row of ones, KWEIGHT ``[pitch]`` fp32, 0 for a masked key; the series says ``share`` times their product.
    """
    rd = tl.arange(0, BD)
    re = tl.arange(0, BDV)
    offsets = places.to(tl.int64)
    kept = present
    if HAS_MASK:
        kept = present & (tl.load(MASK + offsets, mask=present, other=0) != 0)
    if D == BD:
        k = tl.load(K + offsets[:, None] * stride_kn + rd[None, :], mask=present[:, None], other=0.0)
    else:
        k = tl.load(
            K + offsets[:, None] * stride_kn + rd[None, :], mask=present[:, None] & (rd < D)[None, :], other=0.0
        )
    # A masked value may be NaN, and 0 * NaN is NaN: it is not even read.
    if DV == BDV:
        v = tl.load(V + offsets[:, None] * stride_vn + re[None, :], mask=kept[:, None], other=0.0)
    else:
        v = tl.load(V + offsets[:, None] * stride_vn + re[None, :], mask=kept[:, None] & (re < DV)[None, :], other=0.0)
    k = mma_operand(k.to(tl.float32), DTYPE, INTERPRET)
    v = mma_operand(v.to(tl.float32), DTYPE, INTERPRET)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BM, BN]
    if TESTED:
        scores = tl.where(seen & kept[None, :], scores, -float("inf"))
    else:
        scores = tl.where(kept[None, :], scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # exp2(-inf - -inf) is NaN; a query that has met no key yet subtracts 0.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    if TERMS > 0:
        series = _said(
            scores, shift, low, offset, KLOW, KWEIGHT, places, present, pitch, share,
            RANK, BR, TERMS, DTYPE, INTERPRET,
        )  # fmt: skip
        if TESTED:
            series = tl.where(seen, series, 0.0)
        weights -= series
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(mma_operand(weights, DTYPE, INTERPRET), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _finish(
    acc, peak, total, OUT, LSE, rows, inside, stride_on, DV: tl.constexpr, BDV: tl.constexpr, TERMS: tl.constexpr
):
    """Divide and store the rows ``[BM]`` that are ``inside``.

    A query without keys gets zeros and ``-inf``; with ``TERMS``, one whose denominator is not positive and finite NaN.
    """
    re = tl.arange(0, BDV)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    if TERMS > 0:
        # Numerators of a query without keys are 0 as well; NaN stays NaN in a quotient.
        divisor = tl.where((divisor > 0.0) & (divisor < float("inf")), divisor, float("nan"))
    out = acc / divisor[:, None]
    lse = tl.where(empty, -float("inf"), (tl.log2(divisor) + peak) * 0.6931471805599453)
    offsets = rows.to(tl.int64)
    tl.store(
        OUT + offsets[:, None] * stride_on + re[None, :],
        out.to(OUT.dtype.element_ty),
        mask=inside[:, None] & (re < DV)[None, :],
    )
    tl.store(LSE + offsets, lse, mask=inside)


@triton.jit
def _load_queries(
    Q, rows, inside, stride_qn, D: tl.constexpr, BD: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr
):
    """Return the queries ``rows`` ``[BM]`` that are ``inside`` as an operand ``[BM, BD]``; zeros elsewhere."""
    rd = tl.arange(0, BD)
    q = tl.load(
        Q + rows.to(tl.int64)[:, None] * stride_qn + rd[None, :], mask=inside[:, None] & (rd < D)[None, :], other=0.0
    )
    return mma_operand(q.to(tl.float32), DTYPE, INTERPRET)


@triton.jit
def _begin(
    QLOW, OFFSET, NUM, DEN, group, rows, inside, pitch, sums, weight,
    BM: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, TERMS: tl.constexpr,
    DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Begin the softmax of the queries ``rows`` ``[BM]``: with nothing, or with the sums of the series over all keys.

    QLOW ``[G, RANK + 1, pitch]``, OFFSET ``[G, pitch]``, NUM ``[G, sums, DV]`` and DEN ``[G, sums]`` fp32, which
    ``weight`` multiplies. Returns ``acc`` ``[BM, BDV]``, ``peak`` ``[BM]`` (base 2), ``total`` ``[BM]``, ``low``
    ``[BM, BR]`` as an operand and ``offset`` ``[BM]`` (base 2).
    """
    acc = tl.zeros((BM, BDV), tl.float32)
    peak = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    low = mma_operand(tl.zeros((BM, BR), tl.float32), DTYPE, INTERPRET)
    if TERMS > 0:
        group = group.to(tl.int64)
        rr = tl.arange(0, BR)
        re = tl.arange(0, BDV)
        QLOW += group * (RANK + 1) * pitch
        here = inside[:, None] & (rr < RANK)[None, :]
        low = tl.load(QLOW + (rr + 1)[None, :] * pitch + rows[:, None], mask=here, other=0.0)
        low = mma_operand(low.to(tl.float32), DTYPE, INTERPRET)
        peak = tl.load(OFFSET + group * pitch + rows, mask=inside, other=0.0) * 1.4426950408889634
        place = group * sums + rows
        total = weight * tl.load(DEN + place, mask=inside, other=0.0)
        acc = weight * tl.load(
            NUM + place[:, None] * DV + re[None, :], mask=inside[:, None] & (re < DV)[None, :], other=0.0
        )
    return acc, peak, total, low, peak


@triton.jit
def _attend_first(
    acc, peak, total, q, low, offset, K, V, MASK, KLOW, KWEIGHT, count, stride_kn, stride_vn, pitch, scale_log2, share,
    BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, RANK: tl.constexpr,
    BR: tl.constexpr, TERMS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Join the first ``count`` keys, which every query sees.

    Returns ``acc`` ``[BM, BDV]``, ``peak`` ``[BM]`` (base 2) and ``total`` ``[BM]``.
    """
    for start in tl.range(0, count, BN, num_stages=STAGES):
        places = start + tl.arange(0, BN)
        acc, peak, total = _attend(
            acc, peak, total, q, low, offset, K, V, MASK, KLOW, KWEIGHT, places, places < count, places, stride_kn,
            stride_vn, pitch, scale_log2, share, D, DV, BD, BDV, RANK, BR, TERMS, False, HAS_MASK, DTYPE, INTERPRET,
        )  # fmt: skip
    return acc, peak, total


@triton.jit
def window_fwd_kernel(
    Q, K, V, MASK, OUT, LSE, QLOW, OFFSET, NUM, DEN, KLOW, KWEIGHT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_mb, pitch_q, pitch_k, sums,
    heads, queries, keys, window, prefix, chunk, scale_log2, weight, share,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, TERMS: tl.constexpr,
    HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Answer ``BM`` consecutive queries of one batch and head.

    Q ``[B, H, queries, D]``, K ``[B, H, keys, D]``, V ``[B, H, keys, DV]``, MASK ``[B, keys]`` uint8 or unused,
    OUT ``[B, H, queries, DV]``, LSE ``[B, H, queries]`` fp32; last axes contiguous. With ``TERMS`` the arguments of
    ``_begin`` and ``_attend`` besides, ``share`` being ``weight`` over the number of all keys.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    inside = rows < queries
    q = _load_queries(Q + batch * stride_qb + head * stride_qh, rows, inside, stride_qn, D, BD, DTYPE, INTERPRET)
    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    MASK += batch * stride_mb
    acc, peak, total, own, offset = _begin(
        QLOW, OFFSET, NUM, DEN, tl.program_id(1), rows, inside, pitch_q, sums, weight,
        BM, DV, BDV, RANK, BR, TERMS, DTYPE, INTERPRET,
    )  # fmt: skip
    if TERMS > 0:
        KLOW += tl.program_id(1).to(tl.int64) * (RANK + 1) * pitch_k
        KWEIGHT += tl.program_id(1).to(tl.int64) * pitch_k
    acc, peak, total = _attend_first(
        acc, peak, total, q, own, offset, K, V, MASK, KLOW, KWEIGHT, prefix, stride_kn, stride_vn, pitch_k, scale_log2,
        share, BN, D, DV, BD, BDV, RANK, BR, TERMS, HAS_MASK, DTYPE, INTERPRET, STAGES,
    )  # fmt: skip

    # Rows past the end share the chunk of the last query, so they widen nothing.
    begin = tl.minimum(rows, queries - 1) // chunk * chunk
    low = begin - window
    high = tl.minimum(tl.minimum(begin + chunk, queries) + window, keys)
    last = tl.minimum(first + BM, queries) - 1
    from_key = tl.maximum(first // chunk * chunk - window, prefix)
    to_key = tl.minimum(tl.minimum(last // chunk * chunk + chunk, queries) + window, keys)
    for start in tl.range(from_key, to_key, BN, num_stages=STAGES):
        places = start + tl.arange(0, BN)
        seen = (places[None, :] >= low[:, None]) & (places[None, :] < high[:, None])
        acc, peak, total = _attend(
            acc, peak, total, q, own, offset, K, V, MASK, KLOW, KWEIGHT, places, places < to_key, seen, stride_kn,
            stride_vn, pitch_k, scale_log2, share, D, DV, BD, BDV, RANK, BR, TERMS, True, HAS_MASK, DTYPE, INTERPRET,
        )  # fmt: skip
    OUT += batch * stride_ob + head * stride_oh
    LSE += batch * stride_lb + head * stride_lh
    _finish(acc, peak, total, OUT, LSE, rows, inside, stride_on, DV, BDV, TERMS)


@triton.jit
def window_2d_fwd_kernel(
    Q, K, V, MASK, KOUT, VOUT, MOUT, OUT, LSE, QLOW, OFFSET, NUM, DEN, KLOW, KWEIGHT, LOUT, WOUT,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ab, stride_ah, stride_an, stride_wb, stride_wh, stride_wn,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_mb, stride_nb, pitch_q, pitch_k, pitch_out, sums,
    heads, outside, grid_start, grid_rows, grid_columns, reach_rows, reach_columns, scale_log2, weight, share,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    TR: tl.constexpr, TC: tl.constexpr, BN: tl.constexpr,
    RANK: tl.constexpr, BR: tl.constexpr, TERMS: tl.constexpr,
    HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Answer a rectangle of ``TR x TC`` queries of one grid, batch and head.

    Q, K, V, MASK, OUT, LSE and what goes with ``TERMS`` as in ``window_fwd_kernel``, for the whole sequence; KOUT
    ``[B, H, outside, D]``, VOUT ``[B, H, outside, DV]``, MOUT ``[B, outside]``, LOUT ``[G, RANK + 1, pitch_out]`` and
    WOUT ``[G, pitch_out]`` the tokens outside every grid.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    across = tl.cdiv(grid_columns, TC)
    top = tl.program_id(0) // across * TR
    left = tl.program_id(0) % across * TC
    row = top + tl.arange(0, TR * TC) // TC
    column = left + tl.arange(0, TR * TC) % TC
    inside = (row < grid_rows) & (column < grid_columns)
    rows = grid_start + row * grid_columns + column
    q = _load_queries(Q + batch * stride_qb + head * stride_qh, rows, inside, stride_qn, D, BD, DTYPE, INTERPRET)
    acc, peak, total, own, offset = _begin(
        QLOW, OFFSET, NUM, DEN, tl.program_id(1), rows, inside, pitch_q, sums, weight,
        TR * TC, DV, BDV, RANK, BR, TERMS, DTYPE, INTERPRET,
    )  # fmt: skip
    if TERMS > 0:
        KLOW += tl.program_id(1).to(tl.int64) * (RANK + 1) * pitch_k
        KWEIGHT += tl.program_id(1).to(tl.int64) * pitch_k
        LOUT += tl.program_id(1).to(tl.int64) * (RANK + 1) * pitch_out
        WOUT += tl.program_id(1).to(tl.int64) * pitch_out
    acc, peak, total = _attend_first(
        acc, peak, total, q, own, offset, KOUT + batch * stride_ab + head * stride_ah,
        VOUT + batch * stride_wb + head * stride_wh, MOUT + batch * stride_nb, LOUT, WOUT, outside,
        stride_an, stride_wn, pitch_out, scale_log2, share,
        BN, D, DV, BD, BDV, RANK, BR, TERMS, HAS_MASK, DTYPE, INTERPRET, STAGES,
    )  # fmt: skip

    K += batch * stride_kb + head * stride_kh
    V += batch * stride_vb + head * stride_vh
    MASK += batch * stride_mb
    low_row = tl.maximum(top - reach_rows, 0)
    low_column = tl.maximum(left - reach_columns, 0)
    high_row = tl.minimum(tl.minimum(top + TR, grid_rows) + reach_rows, grid_rows)
    wide = tl.minimum(tl.minimum(left + TC, grid_columns) + reach_columns, grid_columns) - low_column
    halo = (high_row - low_row) * wide
    for start in tl.range(0, halo, BN, num_stages=STAGES):
        inner = start + tl.arange(0, BN)
        key_row = low_row + inner // wide
        key_column = low_column + inner % wide
        near_row = tl.abs(row[:, None] - key_row[None, :]) <= reach_rows
        seen = near_row & (tl.abs(column[:, None] - key_column[None, :]) <= reach_columns)
        places = grid_start + key_row * grid_columns + key_column
        acc, peak, total = _attend(
            acc, peak, total, q, own, offset, K, V, MASK, KLOW, KWEIGHT, places, inner < halo, seen, stride_kn,
            stride_vn, pitch_k, scale_log2, share, D, DV, BD, BDV, RANK, BR, TERMS, True, HAS_MASK, DTYPE, INTERPRET,
        )  # fmt: skip
    OUT += batch * stride_ob + head * stride_oh
    LSE += batch * stride_lb + head * stride_lh
    _finish(acc, peak, total, OUT, LSE, rows, inside, stride_on, DV, BDV, TERMS)
