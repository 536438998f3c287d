"""Triton kernel of hybrid attention before the series: tokens in few coordinates, and the exact part of their logits.

What follows are kernels of others: the sums of the series are those of Taylor attention, and the window kernels replace
them by exponentials where a query sees a key.
"""

# Device functions have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

import triton
import triton.language as tl

from attn_kernels.taylor.fused_centring import block_offset, to_nearest
from attn_kernels.taylor.fused_kernels import operand


@triton.jit
def hybrid_turn_kernel(
    X, MASK, BASIS, MEAN, DIRECTION, SHIFT, XT, DOT,
    stride_b, stride_h, stride_n, stride_mb, heads, tokens, pitch, root, scale,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr,
    PROJECT: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Project centred tokens, multiply them by ``root`` and write them with a coordinate per row, behind ones.

    X ``[B, H, tokens, D]``, last axis contiguous, read ``BC`` columns at a time; BASIS ``[H, D, RANK]`` fp32; XT
    ``[B * H, RANK + 1, pitch]``, unused unless ``PROJECT``. DOT ``[B * H, pitch]`` fp32 gets for keys the weight
    ``exp(scale * DIRECTION . x - SHIFT)``, 0 where masked, and for queries the offset ``SHIFT + scale * DIRECTION .
    (x - MEAN)``. MEAN and DIRECTION ``[B * H, BD]`` with BD a multiple of BC, SHIFT ``[B * H]``, fp32.
    """
    group = tl.program_id(1)
    X += block_offset(group, heads, 1, stride_b, stride_h, D)
    BASIS += (group % heads) * D * RANK
    MEAN += group * BD
    DIRECTION += group * BD
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rr = tl.arange(0, BR)
    kept = n < tokens
    if HAS_MASK:
        kept = kept & (tl.load(MASK + (group // heads).to(tl.int64) * stride_mb + n, mask=kept, other=0) != 0)
    dot = tl.zeros((BN,), tl.float32)
    low = tl.zeros((BN, BR), tl.float32)
    for start in range(0, D, BC):
        rd = start + tl.arange(0, BC)
        x = tl.load(
            X + n.to(tl.int64)[:, None] * stride_n + rd[None, :], mask=kept[:, None] & (rd < D)[None, :], other=0.0
        ).to(tl.float32)
        direction = tl.load(DIRECTION + rd)
        centred = tl.where(kept[:, None], x - tl.load(MEAN + rd)[None, :], 0.0)
        dot += tl.sum((x if KEYS else centred) * direction[None, :], 1)
        if PROJECT:
            basis = tl.load(
                BASIS + rd[:, None] * RANK + rr[None, :], mask=(rd < D)[:, None] & (rr < RANK)[None, :], other=0.0
            )
            low = tl.dot(
                operand(centred, DTYPE, INTERPRET), operand(basis, DTYPE, INTERPRET), low, input_precision="ieee"
            )
    shift = tl.load(SHIFT + group)
    dot = tl.where(kept, tl.exp(scale * dot - shift), 0.0) if KEYS else shift + scale * dot
    tl.store(DOT + group.to(tl.int64) * pitch + n, dot, mask=n < pitch)
    if PROJECT:
        XT += group.to(tl.int64) * (RANK + 1) * pitch
        tl.store(
            XT + (rr + 1)[None, :] * pitch + n[:, None],
            to_nearest(low * root, DTYPE, INTERPRET),
            mask=(n < pitch)[:, None] & (rr < RANK)[None, :],
        )
        tl.store(XT + n, to_nearest(tl.full((BN,), 1.0, tl.float32), DTYPE, INTERPRET), mask=n < pitch)
