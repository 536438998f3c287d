"""Triton kernel that sums features of keys with their values, each split of the keys for itself.

The sums of the splits are added afterwards, in a fixed order, so the result does not depend on which came first.
"""

import triton
import triton.language as tl

from attn_kernels.fused import mma_operand


@triton.jit
def state_fwd_kernel(
    PHI, WEIGHT, V, STATE, SUMS,
    tokens, heads, per_split, stride_vb, stride_vh, stride_vn,
    FEATURES: tl.constexpr, VALUES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum weighted features with values, ``STATE [splits, B * H, F, Dv]``, and alone, ``SUMS [splits, B * H, F]``.

    A program sums the keys of one split for a block of features. A key of weight 0 may hold anything.
    """
    split, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    value = tl.arange(0, BLOCK_V)
    values = V + (sequence // heads) * stride_vb + (sequence % heads) * stride_vh
    total = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    alone = tl.zeros((BLOCK_F,), tl.float32)
    first = tl.program_id(1) * per_split
    for start in tl.range(first, tl.minimum(first + per_split, tokens), BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        inside = (row < tokens) & (row < first + per_split)
        weight = tl.load(WEIGHT + sequence * tokens + row, mask=inside, other=0.0)
        used = weight != 0
        phi = tl.load(
            PHI + (sequence * tokens + row[None, :]) * FEATURES + feature[:, None],
            mask=used[None, :] & (feature < FEATURES)[:, None],
            other=0.0,
        )
        phi = mma_operand(phi.to(tl.float32) * weight[None, :], OPERAND, INTERPRET)  # [BF, BN]
        v = tl.load(
            values + row[:, None].to(tl.int64) * stride_vn + value[None, :],
            mask=used[:, None] & (value < VALUES)[None, :],
            other=0.0,
        )
        v = mma_operand(v.to(tl.float32), OPERAND, INTERPRET)  # [BN, BV]
        total = tl.dot(phi, v, total, input_precision="ieee")
        alone += tl.sum(phi.to(tl.float32), 1)
    sequences = tl.num_programs(2)
    place = (split * sequences + sequence) * FEATURES + feature
    real = feature < FEATURES
    tl.store(STATE + place[:, None] * VALUES + value[None, :], total, mask=real[:, None] & (value < VALUES)[None, :])
    tl.store(SUMS + place, alone, mask=real)
