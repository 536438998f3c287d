"""Triton kernels before the features: means, key weights, and tokens turned so that a coordinate is a row.

The mean key is taken under the weights ``exp(scale * a . k_j)`` for the mean query a, which is attention of one query
whose values are the keys themselves: each split of the keys answers with a running maximum, a sum and a weighted sum,
and a few operations on these small tensors join the splits. No atomics, so equal inputs give equal bits.
"""

# Device functions have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl


@triton.jit
def to_nearest(x, dtype: tl.constexpr, interpret: tl.constexpr):
    """Convert float32 ``x`` to ``dtype``, rounded to nearest as on a device.

    Triton's interpreter cuts a bfloat16 off instead, which biases every product of features towards zero; there the
    bits are rounded first.
    """
    if interpret and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        # The carry could turn a NaN into something else.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def block_offset(group, heads, blocks, stride_b, stride_h, width):
    """Offset of the ``group``-th block of columns; groups count blocks within heads within batch rows."""
    head = (group // blocks) % heads
    batch = group // (blocks * heads)
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + (group % blocks) * width


@triton.jit
def taylor_sum_kernel(
    X,
    SUM,
    stride_b,
    stride_h,
    stride_n,
    heads,
    blocks,
    tokens,
    span,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum the tokens of one split: X ``[B, H, tokens, blocks * D]`` to SUM ``[splits, G, BD]`` fp32."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    X += block_offset(group, heads, blocks, stride_b, stride_h, D)
    rd = tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    stop = tl.minimum(split * span + span, tokens)
    for start in range(split * span, stop, BN):
        n = start + tl.arange(0, BN)
        x = tl.load(
            X + n.to(tl.int64)[:, None] * stride_n + rd[None, :],
            mask=(n < stop)[:, None] & (rd < D)[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(SUM + (split * tl.num_programs(1) + group).to(tl.int64) * BD + rd, total)


@triton.jit
def taylor_key_mean_kernel(
    K,
    MASK,
    QMEAN,
    PEAK,
    TOTAL,
    SUM,
    stride_b,
    stride_h,
    stride_n,
    stride_mb,
    heads,
    blocks,
    tokens,
    span,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Weigh the keys of one split by ``exp(scale * QMEAN . k)`` and sum them.

    K ``[B, H, tokens, blocks * D]``, MASK ``[B, tokens]`` uint8, QMEAN ``[G, BD]`` fp32; PEAK and TOTAL ``[splits, G]``
    and SUM ``[splits, G, BD]`` fp32: maximum of the logits, sum of the weights below it, weighted sum of the keys.
    """
    split = tl.program_id(0)
    group = tl.program_id(1)
    K += block_offset(group, heads, blocks, stride_b, stride_h, D)
    MASK += (group // (blocks * heads)).to(tl.int64) * stride_mb
    rd = tl.arange(0, BD)
    mean = tl.load(QMEAN + group * BD + rd)
    peak = tl.full((BN,), -float("inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    weighted = tl.zeros((BN, BD), tl.float32)
    stop = tl.minimum(split * span + span, tokens)
    for start in range(split * span, stop, BN):
        n = start + tl.arange(0, BN)
        kept = n < stop
        if HAS_MASK:
            kept = kept & (tl.load(MASK + n, mask=kept, other=0) != 0)
        x = tl.load(
            K + n.to(tl.int64)[:, None] * stride_n + rd[None, :], mask=kept[:, None] & (rd < D)[None, :], other=0.0
        ).to(tl.float32)
        logit = tl.where(kept, scale * tl.sum(x * mean[None, :], 1), -float("inf"))
        # Each lane keeps a softmax of its own; they are joined once, after the loop.
        higher = tl.maximum(peak, logit)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(logit - shift)
        fade = tl.exp(peak - shift)
        total = total * fade + weight
        weighted = weighted * fade[:, None] + weight[:, None] * x
        peak = higher
    highest = tl.max(peak, 0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    fade = tl.exp(peak - shift)
    place = (split * tl.num_programs(1) + group).to(tl.int64)
    tl.store(PEAK + place, highest)
    tl.store(TOTAL + place, tl.sum(total * fade, 0))
    tl.store(SUM + place * BD + rd, tl.sum(weighted * fade[:, None], 0))


@triton.jit
def taylor_turn_kernel(
    X,
    MASK,
    MEAN,
    DIRECTION,
    SHIFT,
    XT,
    DOT,
    stride_b,
    stride_h,
    stride_n,
    stride_mb,
    heads,
    blocks,
    tokens,
    pitch,
    root,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Centre the tokens, multiply them by ``root`` and write them with a coordinate per row, behind a row of ones.

    X ``[B, H, tokens, blocks * D]`` to XT ``[G, D + 1, pitch]``. DOT ``[G, pitch]`` fp32 gets for keys the weight
    ``exp(scale * DIRECTION . x - SHIFT)``, 0 where masked, and for queries the offset of the normaliser, ``SHIFT +
    scale * DIRECTION . (x - MEAN)``. MEAN, DIRECTION ``[G, BD]`` and SHIFT ``[G]`` fp32.
    """
    group = tl.program_id(1)
    X += block_offset(group, heads, blocks, stride_b, stride_h, D)
    rd = tl.arange(0, BD)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    kept = n < tokens
    if HAS_MASK:
        batch = (group // (blocks * heads)).to(tl.int64)
        kept = kept & (tl.load(MASK + batch * stride_mb + n, mask=kept, other=0) != 0)
    x = tl.load(
        X + n.to(tl.int64)[:, None] * stride_n + rd[None, :], mask=kept[:, None] & (rd < D)[None, :], other=0.0
    ).to(tl.float32)
    direction = tl.load(DIRECTION + group * BD + rd)
    shift = tl.load(SHIFT + group)
    centred = x - tl.load(MEAN + group * BD + rd)[None, :]
    centred = tl.where(kept[:, None], centred, 0.0)
    if KEYS:
        dot = tl.where(kept, tl.exp(scale * tl.sum(x * direction[None, :], 1) - shift), 0.0)
    else:
        dot = shift + scale * tl.sum(centred * direction[None, :], 1)
    XT += group.to(tl.int64) * (D + 1) * pitch
    tl.store(
        XT + (rd + 1)[None, :] * pitch + n[:, None],
        to_nearest(centred * root, DTYPE, INTERPRET),
        mask=(n < pitch)[:, None] & (rd < D)[None, :],
    )
    tl.store(XT + n, to_nearest(tl.full((BN,), 1.0, tl.float32), DTYPE, INTERPRET), mask=n < pitch)
    tl.store(DOT + group.to(tl.int64) * pitch + n, dot, mask=n < pitch)
