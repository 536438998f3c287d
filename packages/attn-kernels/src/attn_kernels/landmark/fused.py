"""Triton kernel of landmark attention: flash attention to gathered keys, each with its own bias."""

from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.fused import mma_operand
from attn_kernels.partial import Partial
from attn_kernels.targets import Target, device_target
from attn_kernels.triton_support import interpreted

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class KernelConfig:
    """How the kernel is cut into blocks.

    Attributes:
        queries: Queries of a block.
        keys: Landmarks of a block.
        warps: Warps of a block.
        stages: Stages of the software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


_HALF = MappingProxyType(
    {
        "default": KernelConfig(128, 64, 8, 2),
        "sm80": KernelConfig(128, 64, 8, 3),
        "sm90": KernelConfig(128, 64, 8, 3),
        "sm100": KernelConfig(128, 64, 8, 3),
        "gfx942": KernelConfig(128, 32, 8, 1),
    }
)
_FULL = KernelConfig(32, 32, 8, 1)


def kernel_config(target: Target, half: bool, wide: bool) -> KernelConfig:
    """Return the stored configuration.

    Args:
        target: Family of GPUs.
        half: Operands in bfloat16 or float16; else float32.
        wide: A head or value width beyond 128: smaller blocks.
    """
    if not half:
        return KernelConfig(16, 16, 8, 1) if wide else _FULL
    if wide:
        return KernelConfig(64, 32, 8, 1 if target == "gfx942" else 2)
    return _HALF[target] if target in _HALF else _HALF["default"]


@triton.jit
def landmark_fwd_kernel(
    Q, K, V, INDEX, BIAS, OUT, LSE,
    queries, landmarks, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, INTERPRET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend from ``BLOCK_M`` queries of one head to all landmarks, with the online softmax in base 2.

    ``Q``, ``K`` and ``V`` are ``[B, H, N, width]`` with strides. ``INDEX`` ``[landmarks]`` (int64) names the rows of
    ``K`` and ``V``; ``None`` = the first ones. ``BIAS`` ``[B, landmarks]`` (float32) is added to the scores, ``-inf``
    removes a landmark, which is then not read; ``None`` = 0. ``OUT`` ``[B, H, queries, Dv]`` and ``LSE``
    ``[B, H, queries]`` are contiguous.
    """
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside, wide, real = row < queries, width < WIDTH, value < VALUES
    place = Q + batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qn + width[None, :]
    q = tl.load(place, mask=inside[:, None] & wide[None, :], other=0.0)
    q = mma_operand(q.to(tl.float32), OPERAND, INTERPRET)  # [BM, BD]
    keys = K + batch * stride_kb + head * stride_kh
    values = V + batch * stride_vb + head * stride_vh
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in tl.range(0, landmarks, BLOCK_N, num_stages=STAGES):
        number = start + tl.arange(0, BLOCK_N)
        used = number < landmarks
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if BIAS is not None:
            bias = tl.load(BIAS + batch * landmarks + number, mask=used, other=float("-inf"))
            used = bias != float("-inf")
        position = number.to(tl.int64)
        if INDEX is not None:
            position = tl.load(INDEX + number, mask=used, other=0)
        k = tl.load(
            keys + position[None, :] * stride_kn + width[:, None], mask=used[None, :] & wide[:, None], other=0.0
        )
        k = mma_operand(k.to(tl.float32), OPERAND, INTERPRET)  # [BD, BN]
        v = tl.load(
            values + position[:, None] * stride_vn + value[None, :], mask=used[:, None] & real[None, :], other=0.0
        )
        v = mma_operand(v.to(tl.float32), OPERAND, INTERPRET)  # [BN, BV]
        scores = tl.dot(q, k, input_precision="ieee") * (scale * _LOG2_E) + (bias * _LOG2_E)[None, :]
        scores = tl.where(used[None, :], scores, float("-inf"))  # [BM, BN]
        larger = tl.maximum(peak, tl.max(scores, 1))
        # A query without keys so far: exp(-inf - -inf) would be NaN.
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - safe[:, None])
        older = tl.exp2(peak - safe)
        total = total * older + tl.sum(weights, 1)
        weights = mma_operand(weights, OPERAND, INTERPRET)
        out = tl.dot(weights, v, out * older[:, None], input_precision="ieee")
        peak = larger
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(divisor)) / _LOG2_E)
    target = OUT + (sequence * queries + row[:, None]) * VALUES + value[None, :]
    tl.store(target, (out / divisor[:, None]).to(OUT.dtype.element_ty), mask=inside[:, None] & real[None, :])
    tl.store(LSE + sequence * queries + row, lse, mask=inside)


def refuse_landmark_fused(q: Tensor, v: Tensor) -> str | None:
    """Say why the kernel cannot serve these tensors, or ``None``.

    Args:
        q: ``[B, H, Nq, D]``.
        v: ``[B, H, Nk, Dv]``.
    """
    if q.dtype is torch.float64:
        return "it has no float64"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"its largest head width is 256, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def landmark_fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, index: Tensor | None, scale: float
) -> Partial:
    """Attend to landmarks with the Triton kernel; no gradient, nothing beyond inputs and outputs in memory.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        bias: ``[B, M]``, added to the scores of the landmarks; ``-inf`` removes one. ``None`` = 0.
        index: ``[M]`` int64, rows of ``k`` and ``v`` that are landmarks; ``None`` = all rows.
        scale: Score scale.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 ``lse``.
    """
    # The kernel walks a row of q, k and v with stride 1.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, width = q.shape
    values = v.shape[3]
    out = torch.empty(batch, heads, queries, values, dtype=v.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    config = kernel_config(device_target(q.device), q.dtype is not torch.float32, max(width, values) > 128)
    operands = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    landmark_fwd_kernel[(triton.cdiv(queries, config.queries), batch * heads)](
        q,
        k,
        v,
        None if index is None else index.contiguous(),
        None if bias is None else bias.to(torch.float32).contiguous(),
        out,
        lse,
        queries,
        k.shape[2] if index is None else index.shape[0],
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale,
        WIDTH=width,
        VALUES=values,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_V=max(16, triton.next_power_of_2(values)),
        BLOCK_M=config.queries,
        BLOCK_N=config.keys,
        OPERAND=operands[q.dtype],
        INTERPRET=interpreted(),
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return Partial(out, lse)
