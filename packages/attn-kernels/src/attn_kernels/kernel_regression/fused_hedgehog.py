"""Triton kernels of Hedgehog feature maps: features of a block of tokens stay in registers and never reach memory."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.fused import mma_operand
from attn_kernels.kernel_regression.feature_map import HedgehogFeatureMap
from attn_kernels.kernel_regression.fused_config import kernel_config, key_splits, triton_dtype
from attn_kernels.kernel_regression.normaliser import mean_values
from attn_kernels.partial import Partial
from attn_kernels.targets import device_target
from attn_kernels.triton_support import interpreted


@triton.jit
def load_map(
    W, BIAS, head, feature, width,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, OPERAND: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the weights ``[BG, BD]`` as an operand and the bias ``[BG]`` of one head's map, 0 where there is none."""
    real = feature < HALF
    place = W + (head * HALF + feature[:, None]) * WIDTH + width[None, :]
    w = tl.load(place, mask=real[:, None] & (width < WIDTH)[None, :], other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_G,), tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + head * HALF + feature, mask=real, other=0.0).to(tl.float32)
    return mma_operand(w, OPERAND, INTERPRET), bias


@triton.jit
def hedgehog_state_fwd_kernel(
    K, V, KEEP, W, BIAS, STATE, SUMS, SHIFT,
    tokens, heads, per_split, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    WIDTH: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
    STATE_OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the features of one sign over one split of the keys, with values and alone.

    ``STATE`` is ``[splits, B * H, 2, G, Dv]``, ``SUMS`` ``[splits, B * H, 2, G]``. Exponents of a feature are shifted
    by the largest of the split so far, written to ``SHIFT``, like ``SUMS`` (0 with softmax: each token has its own).
    """
    split, sign = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    feature, width, value = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    real, wide = feature < HALF, width < WIDTH
    w, bias = load_map(W, BIAS, head, feature, width, HALF, WIDTH, BLOCK_G, OPERAND, INTERPRET)
    shift = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    alone = tl.zeros((BLOCK_G,), tl.float32)
    first = tl.program_id(0) * per_split
    for start in tl.range(first, tl.minimum(first + per_split, tokens), BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        used = (row < tokens) & (row < first + per_split)
        if KEEP is not None:
            used = used & (tl.load(KEEP + batch * tokens + row, mask=used, other=0) != 0)
        far = row.to(tl.int64)
        k = tl.load(
            K + batch * stride_kb + head * stride_kh + far[None, :] * stride_kn + width[:, None],
            mask=used[None, :] & wide[:, None],
            other=0.0,
        )
        v = tl.load(
            V + batch * stride_vb + head * stride_vh + far[:, None] * stride_vn + value[None, :],
            mask=used[:, None] & (value < VALUES)[None, :],
            other=0.0,
        )
        y = tl.dot(w, mma_operand(k.to(tl.float32), OPERAND, INTERPRET), input_precision="ieee") + bias[:, None]
        y = tl.where(sign == 0, y, -y)
        y = tl.where(real[:, None] & used[None, :], y, float("-inf"))  # [BG, BN]
        if SOFTMAX:
            peak = tl.max(y, 0)
            phi = tl.exp(y - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
            phi = phi / tl.where(used, tl.sum(phi, 0), 1.0)[None, :]
        else:
            larger = tl.maximum(shift, tl.max(y, 1))
            safe = tl.where(larger == float("-inf"), 0.0, larger)
            phi = tl.exp(y - safe[:, None])
            older = tl.exp(shift - safe)
            total, alone = total * older[:, None], alone * older
            shift = larger
        v = mma_operand(v.to(tl.float32), STATE_OPERAND, INTERPRET)  # [BN, BV]
        phi = mma_operand(phi, STATE_OPERAND, INTERPRET)
        total = tl.dot(phi, v, total, input_precision="ieee")
        alone += tl.sum(phi.to(tl.float32), 1)
    place = (split * tl.num_programs(2) + sequence) * 2 + sign
    target = STATE + (place * HALF + feature[:, None]) * VALUES + value[None, :]
    tl.store(target, total, mask=real[:, None] & (value < VALUES)[None, :])
    tl.store(SUMS + place * HALF + feature, alone, mask=real)
    if SOFTMAX:
        shift = tl.zeros((BLOCK_G,), tl.float32)
    tl.store(SHIFT + place * HALF + feature, shift, mask=real)


@triton.jit
def query_shares(y, real, places, shift, sign, HALF: tl.constexpr, SOFTMAX: tl.constexpr):
    """Return the share ``[BM, BG]`` of each feature of one sign in the denominator of each query.

    ``y`` ``[BM, BG]`` are the exponents, ``places`` ``[BG]`` where the weights of the features lie (their logarithms,
    for an exponential map), ``shift`` ``[BM]`` what is taken off the exponents of such a map.
    """
    signed = tl.where(sign == 0, y, -y)
    if SOFTMAX:
        signed = tl.where(real[None, :], signed, float("-inf"))
        shares = tl.exp(signed - tl.max(signed, 1)[:, None])
        shares = shares / tl.sum(shares, 1)[:, None]
        shares = shares * tl.load(places + sign * HALF, mask=real, other=0.0)[None, :]
    else:
        sums = tl.load(places + sign * HALF, mask=real, other=float("-inf"))
        shares = tl.exp(signed + sums[None, :] - shift[:, None])
    return shares


@triton.jit
def hedgehog_readout_fwd_kernel(
    Q, W, BIAS, STATE, SUMS, SCALE, OUT, LSE,
    tokens, heads, stride_qb, stride_qh, stride_qn, log_eps,
    WIDTH: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
    STATE_OPERAND: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Read ``BLOCK_V`` columns of the mean values ``STATE [B * H, 2, G, Dv]`` out by a block of queries.

    ``SUMS [B * H, 2, G]`` holds the weights of the mean values with ``SCALE [B * H]`` (softmax), or the logarithms of
    the weights (exponential map): then this is attention to 2 G keys whose scores are ``y + SUMS``. ``OUT`` is
    ``[B, H, tokens, Dv]``, ``LSE`` ``[B, H, tokens]``, both contiguous.
    """
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature, width = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    value = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, real, wide = row < tokens, feature < HALF, width < WIDTH
    place = Q + batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qn + width[None, :]
    q = tl.load(place, mask=inside[:, None] & wide[None, :], other=0.0)
    w = tl.load(
        W + (head * HALF + feature[None, :]) * WIDTH + width[:, None], mask=real[None, :] & wide[:, None], other=0.0
    )
    w = mma_operand(w.to(tl.float32), OPERAND, INTERPRET)  # [BD, BG]
    y = tl.dot(mma_operand(q.to(tl.float32), OPERAND, INTERPRET), w, input_precision="ieee")  # [BM, BG]
    if BIAS is not None:
        y += tl.load(BIAS + head * HALF + feature, mask=real, other=0.0).to(tl.float32)[None, :]
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    rounded = tl.zeros((BLOCK_M,), tl.float32)
    numerator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    places = SUMS + sequence * 2 * HALF + feature
    shift = tl.zeros((BLOCK_M,), tl.float32)
    if not SOFTMAX:
        plus = y + tl.load(places, mask=real, other=float("-inf"))[None, :]
        minus = tl.load(places + HALF, mask=real, other=float("-inf"))[None, :] - y
        peak = tl.max(tl.maximum(plus, minus), 1)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
    # A loop that is not unrolled: registers hold the state of one sign at a time.
    for sign in tl.range(0, 2, num_stages=1):
        shares = query_shares(y, real, places, shift, sign, HALF, SOFTMAX)
        state = tl.load(
            STATE + ((sequence * 2 + sign) * HALF + feature[:, None]) * VALUES + value[None, :],
            mask=real[:, None] & (value < VALUES)[None, :],
            other=0.0,
        )
        state = mma_operand(state.to(tl.float32), STATE_OPERAND, INTERPRET)  # [BG, BV]
        denominator += tl.sum(shares, 1)
        shares = mma_operand(shares, STATE_OPERAND, INTERPRET)  # [BM, BG]
        rounded += tl.sum(shares.to(tl.float32), 1)
        numerator = tl.dot(shares, state, numerator, input_precision="ieee")
    if SOFTMAX:
        shift += tl.log(tl.load(SCALE + sequence))
    # The floor can leave the range of floats; a denominator of 0 would be NaN then.
    floor = tl.maximum(tl.exp(log_eps - shift), 1.2e-38)
    # Numerator and divisor share the rounding, so that the shares add up to one.
    divisor = tl.where(denominator < floor, floor, rounded)
    denominator = tl.where(denominator < floor, floor, denominator)
    target = OUT + (sequence * tokens + row[:, None]) * VALUES + value[None, :]
    out = (numerator / divisor[:, None]).to(OUT.dtype.element_ty)
    tl.store(target, out, mask=inside[:, None] & (value < VALUES)[None, :])
    if tl.program_id(2) == 0:
        tl.store(LSE + sequence * tokens + row, tl.log(denominator) + shift, mask=inside)


def hedgehog_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: HedgehogFeatureMap,
    map_k: HedgehogFeatureMap,
    *,
    keep: Tensor | None,
    eps: float,
    map_dtype: torch.dtype | None,
) -> Partial:
    """Launch the two kernels.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        map_q: Map of the queries.
        map_k: Map of the keys, of the same kind.
        keep: ``[B, Nk]`` uint8, 0 = masked, or ``None``.
        eps: Smallest denominator.
        map_dtype: Dtype of the maps' operands; that of ``q`` if ``None``.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    dtype, softmax = map_dtype or q.dtype, map_q.kind == "softmax"
    shared = {
        "WIDTH": q.shape[3],
        "HALF": map_q.features // 2,
        "VALUES": v.shape[3],
        "SOFTMAX": softmax,
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "BLOCK_G": max(16, triton.next_power_of_2(map_q.features // 2)),
        "OPERAND": triton_dtype(dtype),
        "STATE_OPERAND": triton_dtype(q.dtype),
        "INTERPRET": interpreted(),
    }
    state, sums, shift = _sum_keys(k, v, map_k, keep, dtype, shared)
    means, weights, scale = mean_values(state, sums, q.dtype)
    return _read(q, v, map_q, means, weights if softmax else sums.log() + shift, scale, eps, dtype, shared)


def _sum_keys(
    k: Tensor,
    v: Tensor,
    map_k: HedgehogFeatureMap,
    keep: Tensor | None,
    dtype: torch.dtype,
    shared: dict[str, object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the features of the keys.

    Returns:
        Sums with values ``[B * H, 2, G, Dv]``, alone ``[B * H, 2, G]``, and the logarithms ``[B * H, 2, G]`` of what
        both are too small by.
    """
    sequences, keys, values, half = k.shape[0] * k.shape[1], k.shape[2], v.shape[3], map_k.features // 2
    config = kernel_config("hedgehog_state", device_target(k.device), k.dtype is not torch.float32)
    splits, per_split = key_splits(2 * sequences, keys)
    parts = torch.empty(splits, sequences, 2, half, values, dtype=torch.float32, device=k.device)
    sums, shifts = torch.empty_like(parts[..., 0]), torch.empty_like(parts[..., 0])
    hedgehog_state_fwd_kernel[(splits, 2, sequences)](
        k, v, keep, map_k.weight.to(dtype).contiguous(), _contiguous(map_k.bias), parts, sums, shifts,
        keys, k.shape[1], per_split, *k.stride()[:3], *v.stride()[:3],
        BLOCK_N=config.columns, BLOCK_V=max(16, triton.next_power_of_2(values)), STAGES=config.stages,
        num_warps=config.warps, num_stages=config.stages, **shared,
    )  # fmt: skip
    # Splits have shifts of their own. One that is not a number reaches the sums through its own part.
    shift = shifts.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf).amax(dim=0)
    shift = torch.where(shift == -torch.inf, 0, shift)
    factor = torch.exp(shifts - shift)
    return (parts * factor.unsqueeze(-1)).sum(dim=0), (sums * factor).sum(dim=0), shift


def _read(
    q: Tensor,
    v: Tensor,
    map_q: HedgehogFeatureMap,
    means: Tensor,
    weights: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    shared: dict[str, object],
) -> Partial:
    """Read ``mean_values`` out by the queries."""
    batch, heads, queries, _ = q.shape
    values = v.shape[3]
    config = kernel_config("hedgehog_readout", device_target(q.device), q.dtype is not torch.float32)
    block_v = min(max(16, triton.next_power_of_2(values)), config.columns)
    out = torch.empty(batch, heads, queries, values, dtype=v.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(queries, config.rows), batch * heads, triton.cdiv(values, block_v))
    hedgehog_readout_fwd_kernel[grid](
        q, map_q.weight.to(dtype).contiguous(), _contiguous(map_q.bias), means, weights, scale, out, lse,
        queries, heads, *q.stride()[:3], math.log(eps),
        BLOCK_M=config.rows, BLOCK_V=block_v, num_warps=config.warps, num_stages=1, **shared,
    )  # fmt: skip
    return Partial(out, lse)


def _contiguous(x: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor for one that may be absent."""
    return None if x is None else x.contiguous()
