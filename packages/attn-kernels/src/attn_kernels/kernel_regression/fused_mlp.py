"""Triton kernels of a three-layer feature map: hidden layers, features of keys, and the read-out of queries.

A chunk of tokens goes through the two hidden layers in one kernel and is stored. For keys a second kernel writes the
features and their norms. For queries the second kernel goes on from the features to the output, so that these never
reach memory.
"""

import triton
import triton.language as tl

from attn_kernels.fused import mma_operand


@triton.jit
def silu(x, APPROXIMATE: tl.constexpr):
    """Multiply ``x`` by its sigmoid; as half of ``x (1 + tanh(x / 2))`` where the device has a fast tanh."""
    if APPROXIMATE:
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half + half * tanh
    else:
        return x * tl.sigmoid(x)


@triton.jit
def mlp_hidden_fwd_kernel(
    X, W1, B1, W2, B2, H2,
    tokens, heads, stride_xb, stride_xh, stride_xn,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr, OPERAND: tl.constexpr, APPROXIMATE: tl.constexpr, INTERPRET: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute ``silu(silu(x w1 + b1) w2 + b2)`` for ``BLOCK_M`` tokens and ``BLOCK_N`` of the hidden values.

    The first layer is computed again for each block of columns of the second: a seventh of the work, and no trip of
    its values through memory. ``X`` is ``[B, H, tokens, WIDTH]`` with strides; ``H2`` ``[B * H, tokens, HIDDEN]``.
    """
    sequence = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, width = row < tokens, tl.arange(0, BLOCK_D)
    base = X + (sequence // heads) * stride_xb + (sequence % heads) * stride_xh
    place = base + row[:, None].to(tl.int64) * stride_xn + width[None, :]
    x = tl.load(place, mask=inside[:, None] & (width < WIDTH)[None, :], other=0.0).to(tl.float32)
    x = mma_operand(x, OPERAND, INTERPRET)  # [BM, BD]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_J, num_stages=STAGES):
        middle = start + tl.arange(0, BLOCK_J)
        real = middle < HIDDEN
        w1 = tl.load(
            W1 + middle[None, :] * WIDTH + width[:, None], mask=real[None, :] & (width < WIDTH)[:, None], other=0.0
        )
        b1 = tl.load(B1 + middle, mask=real, other=0.0).to(tl.float32)
        w1 = mma_operand(w1.to(tl.float32), OPERAND, INTERPRET)  # [BD, BJ]
        hidden = silu(tl.dot(x, w1, input_precision="ieee") + b1[None, :], APPROXIMATE)
        w2 = tl.load(
            W2 + column[None, :] * HIDDEN + middle[:, None], mask=real[:, None] & (column < HIDDEN)[None, :], other=0.0
        )
        w2 = mma_operand(w2.to(tl.float32), OPERAND, INTERPRET)  # [BJ, BN]
        total = tl.dot(mma_operand(hidden, OPERAND, INTERPRET), w2, total, input_precision="ieee")
    b2 = tl.load(B2 + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    total = silu(total + b2[None, :], APPROXIMATE)
    target = H2 + (sequence * tokens + row[:, None]) * HIDDEN + column[None, :]
    tl.store(target, total.to(H2.dtype.element_ty), mask=inside[:, None] & (column < HIDDEN)[None, :])


@triton.jit
def feature_block(
    H2, W3, B3,
    first_row, row, inside, column,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute ``elu(h w3 + b3) + 1`` for some tokens and features, 0 for features that do not exist."""
    total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    real = column < FEATURES
    for start in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
        middle = start + tl.arange(0, BLOCK_K)
        known = middle < HIDDEN
        hidden = tl.load(
            H2 + (first_row + row[:, None]) * HIDDEN + middle[None, :],
            mask=inside[:, None] & known[None, :],
            other=0.0,
        )
        w3 = tl.load(W3 + column[None, :] * HIDDEN + middle[:, None], mask=known[:, None] & real[None, :], other=0.0)
        hidden = mma_operand(hidden.to(tl.float32), OPERAND, INTERPRET)  # [BM, BK]
        w3 = mma_operand(w3.to(tl.float32), OPERAND, INTERPRET)  # [BK, BF]
        total = tl.dot(hidden, w3, total, input_precision="ieee")
    total += tl.load(B3 + column, mask=real, other=0.0).to(tl.float32)[None, :]
    # The exponential of what is positive could overflow; a NaN stays one.
    features = tl.where(total > 0, total + 1.0, tl.exp(tl.where(total > 0, 0.0, total)))
    return tl.where(real[None, :], features, 0.0)


@triton.jit
def mlp_features_fwd_kernel(
    H2, W3, B3, KEEP, PHI, WEIGHT,
    tokens, heads, stride_keep, norm_eps,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the features of keys ``PHI [B * H, tokens, F]`` and their weights ``WEIGHT [B * H, tokens]``.

    The weight is one over the norm of the features, 1 without normalisation, and 0 for a masked key. ``KEEP`` is
    ``[B, tokens]`` (uint8) with the stride ``stride_keep`` between rows, or ``None``.
    """
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, FEATURES, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        features = feature_block(
            H2, W3, B3, sequence * tokens, row, inside, column,
            HIDDEN, FEATURES, BLOCK_M, BLOCK_F, BLOCK_K, OPERAND, INTERPRET, STAGES,
        )  # fmt: skip
        squares += tl.sum(features * features, 1)
        target = PHI + (sequence * tokens + row[:, None]) * FEATURES + column[None, :]
        tl.store(target, features.to(PHI.dtype.element_ty), mask=inside[:, None] & (column < FEATURES)[None, :])
    weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    if NORMALISE:
        weight = weight / (tl.sqrt(squares) + norm_eps)
    if KEEP is not None:
        kept = tl.load(KEEP + (sequence // heads) * stride_keep + row, mask=inside, other=0)
        weight = tl.where(kept != 0, weight, 0.0)
    tl.store(WEIGHT + sequence * tokens + row, weight, mask=inside)


@triton.jit
def mlp_readout_fwd_kernel(
    H2, W3, B3, STATE, SUMS, SCALE, OUT, LSE,
    tokens, heads, stride_ob, stride_oh, stride_on, stride_lb, stride_lh, norm_eps, eps,
    HIDDEN: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
    STATE_OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turn hidden values of queries into features and these into output and normaliser.

    ``STATE`` ``[B * H, F, Dv]`` holds mean values, ``SUMS`` ``[B * H, F]`` and ``SCALE`` ``[B * H]`` their weights.
    ``OUT`` is ``[B, H, tokens, Dv]`` and ``LSE`` ``[B, H, tokens]`` with strides. The norm of the features is known
    only after all blocks of them; it divides sums instead of features.
    """
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, value = row < tokens, tl.arange(0, BLOCK_V)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    rounded = tl.zeros((BLOCK_M,), tl.float32)
    numerator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in tl.range(0, FEATURES, BLOCK_F):
        column = first + tl.arange(0, BLOCK_F)
        real = column < FEATURES
        features = feature_block(
            H2, W3, B3, sequence * tokens, row, inside, column,
            HIDDEN, FEATURES, BLOCK_M, BLOCK_F, BLOCK_K, OPERAND, INTERPRET, STAGES,
        )  # fmt: skip
        squares += tl.sum(features * features, 1)
        alone = tl.load(SUMS + sequence * FEATURES + column, mask=real, other=0.0)
        shares = features * alone[None, :]
        denominator += tl.sum(shares, 1)
        shares = mma_operand(shares, STATE_OPERAND, INTERPRET)  # [BM, BF]
        rounded += tl.sum(shares.to(tl.float32), 1)
        state = tl.load(
            STATE + (sequence * FEATURES + column[:, None]) * VALUES + value[None, :],
            mask=real[:, None] & (value < VALUES)[None, :],
            other=0.0,
        )
        state = mma_operand(state.to(tl.float32), STATE_OPERAND, INTERPRET)  # [BF, BV]
        numerator = tl.dot(shares, state, numerator, input_precision="ieee")
    weight = tl.load(SCALE + sequence)
    if NORMALISE:
        weight = weight / (tl.sqrt(squares) + norm_eps)
    denominator = denominator * weight
    # Numerator and divisor share the rounding, so that the shares add up to one.
    divisor = tl.where(denominator < eps, eps, rounded * weight)
    denominator = tl.where(denominator < eps, eps, denominator)
    batch, head = sequence // heads, sequence % heads
    place = OUT + batch * stride_ob + head * stride_oh + row[:, None].to(tl.int64) * stride_on + value[None, :]
    out = (numerator * (weight / divisor)[:, None]).to(OUT.dtype.element_ty)
    tl.store(place, out, mask=inside[:, None] & (value < VALUES)[None, :])
    tl.store(LSE + batch * stride_lb + head * stride_lh + row, tl.log(denominator), mask=inside)
