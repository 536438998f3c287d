"""Triton kernels of the features: their indices, the sums over the keys, and what the queries read from them.

A feature is a product of P - 1 rows of the turned tokens, the first of which is the constant 1, so one kernel makes
the monomials of every degree. The rows of a tile of features are found in a table of indices; each is contiguous along
the tokens, so that it comes in wide loads. Weights of the features (multiplicities over factorials) are multiplied
once into the sums. The denominator is summed in float32 from features that were never rounded.
"""

# Device functions have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl

from attn_kernels.taylor.fused_centring import block_offset, to_nearest


@triton.jit
def operand(x, dtype: tl.constexpr, interpret: tl.constexpr):
    """Round float32 ``x`` to the dtype of a product; the interpreter multiplies the rounded values in float32."""
    rounded = to_nearest(x, dtype, interpret)
    if interpret:
        rounded = rounded.to(tl.float32)
    return rounded


@triton.jit
def taylor_unrank_kernel(TABLE, WEIGHT, first, count, variables, DEGREE: tl.constexpr, BF: tl.constexpr):
    """Turn ``count`` ranks from ``first`` on into indices and weights of monomials, by arithmetic alone.

    The combinatorial number system for multisets (Knuth, TAOCP 4A, 7.2.1.3), ranks in colexicographic order: the
    largest index of a monomial of degree p is the greatest i with ``C(i + p - 1, p) <= rank``, and the remainder is a
    rank of degree p - 1. TABLE ``[DEGREE, count]`` int32, non-increasing down a column; WEIGHT ``[count]`` fp32,
    ``1 / prod_i c_i!`` for a monomial in which coordinate i > 0 stands c_i times.
    """
    place = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = place < count
    rank = first + place.to(tl.int64)
    weight = tl.full((BF,), 1.0, tl.float32)
    run = tl.full((BF,), 1.0, tl.float32)
    previous = tl.full((BF,), -1, tl.int32)
    for position in tl.static_range(DEGREE):
        degree = DEGREE - position
        largest = tl.zeros((BF,), tl.int32)
        below = tl.zeros((BF,), tl.int64)
        # C(degree, degree), the number of monomials in the constant alone.
        smaller = tl.full((BF,), 1, tl.int64)
        for i in range(1, variables):
            reached = smaller <= rank
            largest += reached.to(tl.int32)
            below = tl.where(reached, smaller, below)
            smaller = smaller * (i + degree) // i
        rank -= below
        run = tl.where(largest == previous, run + 1.0, 1.0)
        weight = tl.where(largest > 0, weight / run, weight)
        previous = largest
        tl.store(TABLE + position * count + place, largest, mask=inside)
    tl.store(WEIGHT + place, weight, mask=inside)


@triton.jit
def _features(XT, TABLE, f, present, n, there, count, pitch, DEGREE: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr):
    """Return ``[BF, BN]`` fp32: the features ``f`` of the tokens ``n``; anything where either does not exist.

    The rows go on with zeros to ``pitch``, a multiple of 16: up to there loads stay wide. Offsets within a group are
    32 bits wide, which halves the registers of the tile; the launch checks that they fit.
    """
    x = tl.full((BF, BN), 1.0, tl.float32)
    for position in tl.static_range(DEGREE):
        row = tl.load(TABLE + position * count + f, mask=present, other=0)
        factor = tl.load(
            XT + (row[:, None] * pitch + n[None, :]), mask=present[:, None] & there[None, :], other=0.0
        ).to(tl.float32)
        x = factor if position == 0 else x * factor
    return x


@triton.jit
def taylor_state_kernel(
    KT, W, V, MASK, TABLE, S, Z,
    stride_b, stride_h, stride_n, stride_mb, heads, blocks, keys, pitch, count, span,
    D: tl.constexpr, DV: tl.constexpr, DEGREE: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_V: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum ``BF`` features of one split of the keys with ``BE`` columns of their values.

    KT ``[G, D + 1, pitch]``, W ``[G, pitch]`` fp32, V ``[B, H, keys, blocks * DV]``, MASK ``[B, keys]`` uint8, TABLE
    ``[DEGREE, count]``; S ``[splits, G, count, DV]`` and Z ``[splits, G, count]`` fp32. Grid: tiles of features times
    tiles of columns, groups, splits. Without ``HAS_V`` only Z.
    """
    group = tl.program_id(1)
    columns = tl.cdiv(DV, BE)
    f = (tl.program_id(0) // columns) * BF + tl.arange(0, BF)
    column = tl.program_id(0) % columns
    e = column * BE + tl.arange(0, BE)
    present = f < count
    KT += group.to(tl.int64) * (D + 1) * pitch
    W += group.to(tl.int64) * pitch
    V += block_offset(group, heads, blocks, stride_b, stride_h, DV)
    MASK += (group // (blocks * heads)).to(tl.int64) * stride_mb
    acc = tl.zeros((BF, BE), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    begin = tl.program_id(2) * span
    stop = tl.minimum(begin + span, keys)
    for start in tl.range(begin, stop, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        there = n < stop
        x = _features(KT, TABLE, f, present, n, n < pitch, count, pitch, DEGREE, BF, BN)
        w = tl.load(W + n, mask=there, other=0.0)
        # The tokens past the end have weight 0; the features of degree 0 do not.
        z += tl.sum(x * w[None, :], 1)
        if HAS_V:
            kept = there
            if HAS_MASK:
                kept = there & (tl.load(MASK + n, mask=there, other=0) != 0)
            v = tl.load(
                V + n.to(tl.int64)[:, None] * stride_n + e[None, :], mask=kept[:, None] & (e < DV)[None, :], other=0.0
            )
            v = v.to(tl.float32) * w[:, None]
            acc = tl.dot(operand(x, DTYPE, INTERPRET), operand(v, DTYPE, INTERPRET), acc, input_precision="ieee")
    place = (tl.program_id(2) * tl.num_programs(1) + group).to(tl.int64) * count + f
    if HAS_V:
        tl.store(S + place[:, None] * DV + e[None, :], acc, mask=present[:, None] & (e < DV)[None, :])
    tl.store(Z + place, z, mask=present & (f * 0 + column == 0))


@triton.jit
def taylor_reduce_kernel(
    S, Z, WEIGHT, SUM, ZSUM, splits, groups, count, share,
    DV: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, HAS_V: tl.constexpr, DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the splits in order and weigh the features: S ``[splits, G, count, DV]`` to SUM ``[G, count, DV]``.

    ``share``, one over the number of keys, makes means of the sums: sums of many keys would overflow float16.
    """
    group = tl.program_id(1)
    columns = tl.cdiv(DV, BE)
    f = (tl.program_id(0) // columns) * BF + tl.arange(0, BF)
    column = tl.program_id(0) % columns
    e = column * BE + tl.arange(0, BE)
    present = f < count
    here = present[:, None] & (e < DV)[None, :]
    acc = tl.zeros((BF, BE), tl.float32)
    z = tl.zeros((BF,), tl.float32)
    for split in range(0, splits):
        place = (split * groups + group).to(tl.int64) * count + f
        z += tl.load(Z + place, mask=present, other=0.0)
        if HAS_V:
            acc += tl.load(S + place[:, None] * DV + e[None, :], mask=here, other=0.0)
    weight = share * tl.load(WEIGHT + f, mask=present, other=0.0)
    place = group.to(tl.int64) * count + f
    if HAS_V:
        tl.store(SUM + place[:, None] * DV + e[None, :], to_nearest(acc * weight[:, None], DTYPE, INTERPRET), mask=here)
    tl.store(ZSUM + place, z * weight, mask=present & (f * 0 + column == 0))


@triton.jit
def store_answer(
    num, den, OFFSET, TOTAL, OUT, LSE, group, n, there, e, pitch, stride_b, stride_h, stride_n, stride_l, heads,
    blocks, eps, DV: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Divide and store; NaN where the denominator is not above ``eps``, zeros and ``-inf`` where there is no key.

    ``num`` ``[BQ, BE]`` and ``den`` ``[BQ]`` of queries ``n`` and columns ``e``. OFFSET ``[G, pitch]``, TOTAL ``[G]``
    the sum of the key weights (0 = no key), LSE ``[G, stride_l]``.
    """
    # An infinite denominator would turn finite sums into zeros; comparisons with NaN are false.
    valid = (den > eps) & (den < float("inf"))
    divisor = tl.where(valid, den, 1.0)
    empty = tl.load(TOTAL + group) == 0.0
    out = tl.where(valid[:, None], num / divisor[:, None], float("nan"))
    out = tl.where(empty, 0.0, out)
    OUT += block_offset(group, heads, blocks, stride_b, stride_h, DV)
    tl.store(
        OUT + n.to(tl.int64)[:, None] * stride_n + e[None, :],
        to_nearest(out, DTYPE, INTERPRET),
        mask=there[:, None] & (e < DV)[None, :],
    )
    offset = tl.load(OFFSET + group.to(tl.int64) * pitch + n, mask=there, other=0.0)
    lse = tl.where(valid, tl.log(divisor) + offset, float("nan"))
    lse = tl.where(empty, -float("inf"), lse)
    tl.store(LSE + group.to(tl.int64) * stride_l + n, lse, mask=there & (n * 0 + tl.program_id(2) == 0))


@triton.jit
def taylor_query_kernel(
    QT, TABLE, S, Z, FACTOR, OFFSET, TOTAL, NUM, DEN, OUT, LSE,
    stride_b, stride_h, stride_n, heads, blocks, queries, pitch, count, resume, eps,
    D: tl.constexpr, DV: tl.constexpr, DEGREE: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr, BQ: tl.constexpr,
    FINISH: tl.constexpr, HAS_V: tl.constexpr, FITTED: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Read ``count`` features for ``BQ`` queries and ``BE`` columns; the last chunk of features divides and stores.

    QT ``[G, D + 1, pitch]``, S ``[G, count, DV]``, Z ``[G, count]`` fp32, OUT ``[B, H, queries, blocks * DV]``, LSE
    ``[G, queries]``. With several chunks of features NUM ``[G, queries, DV]`` and DEN ``[G, queries]`` fp32 carry the
    sums from one to the next: read if ``resume``, written unless ``FINISH``. Without ``HAS_V`` only DEN is made. With
    ``FITTED`` a feature in which the constant stands c times is multiplied by row c of FACTOR ``[G, DEGREE + 1,
    queries]`` fp32.
    """
    group = tl.program_id(1)
    column = tl.program_id(2)
    n = tl.program_id(0) * BQ + tl.arange(0, BQ)
    e = column * BE + tl.arange(0, BE)
    there = n < queries
    here = there[:, None] & (e < DV)[None, :]
    QT += group.to(tl.int64) * (D + 1) * pitch
    FACTOR += group.to(tl.int64) * (DEGREE + 1) * queries
    TABLE_Z = Z + group.to(tl.int64) * count
    S += group.to(tl.int64) * count * DV
    sums = group.to(tl.int64) * queries + n
    num = tl.zeros((BQ, BE), tl.float32)
    den = tl.zeros((BQ,), tl.float32)
    if resume != 0:
        den += tl.load(DEN + sums, mask=there, other=0.0)
        if HAS_V:
            num += tl.load(NUM + sums[:, None] * DV + e[None, :], mask=here, other=0.0)
    for start in tl.range(0, count, BF, num_stages=STAGES):
        f = start + tl.arange(0, BF)
        present = f < count
        x = _features(QT, TABLE, f, present, n, n < pitch, count, pitch, DEGREE, BF, BQ)
        if FITTED:
            constants = tl.zeros((BF,), tl.int32)
            for position in tl.static_range(DEGREE):
                constants += (tl.load(TABLE + position * count + f, mask=present, other=1) == 0).to(tl.int32)
            x *= tl.load(
                FACTOR + (constants[:, None] * queries + n[None, :]), mask=present[:, None] & there[None, :], other=0.0
            )
        z = tl.load(TABLE_Z + f, mask=present, other=0.0)
        den += tl.sum(x * z[:, None], 0)
        if HAS_V:
            s = tl.load(S + (f[:, None] * DV + e[None, :]), mask=present[:, None] & (e < DV)[None, :], other=0.0).to(
                tl.float32
            )
            num = tl.dot(
                tl.trans(operand(x, DTYPE, INTERPRET)), operand(s, DTYPE, INTERPRET), num,
                input_precision="ieee",
            )  # fmt: skip
    if FINISH and HAS_V:
        store_answer(
            num, den, OFFSET, TOTAL, OUT, LSE, group, n, there, e, pitch, stride_b, stride_h, stride_n, queries, heads,
            blocks, eps, DV, DTYPE, INTERPRET,
        )  # fmt: skip
    else:
        # Only the first tile of columns owns the denominator; the others would read it while it is written.
        tl.store(DEN + sums, den, mask=there & (n * 0 + column == 0))
        if HAS_V:
            tl.store(NUM + sums[:, None] * DV + e[None, :], num, mask=here)
