"""Hybrid attention in Triton: the series over all keys, replaced by exponentials where a query sees a key.

Two means and the weights of the keys come from the kernels of Taylor attention; one pass over queries and keys projects
them and finds the exact part of their logits. The sums over all keys and what each query reads from them are Taylor
attention without its division. The window kernels then begin with these sums instead of nothing: every pair near by
adds its exponential less what the series said of it. Besides inputs and outputs memory holds the projected tokens, in
the dtype of the product, and the sums read by the queries ``[B, H, Nq, Dv + 1]`` in float32.
"""

import math

import torch
import triton
from torch import Tensor

from attn_kernels.hybrid.far import FarSettings
from attn_kernels.hybrid.fused_kernels import hybrid_turn_kernel
from attn_kernels.hybrid.near import Near
from attn_kernels.hybrid.projection import Projection
from attn_kernels.partial import Partial
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.fused import refuse_sizes, taylor_fused_sums
from attn_kernels.taylor.fused_tokens import (
    DTYPES,
    TOKENS,
    Means,
    Tokens,
    find_means,
    new_rows,
    padded_width,
    turn_tokens,
)
from attn_kernels.triton_support import interpreted
from attn_kernels.window.fused import Series, window_fused, window_fused_2d
from attn_kernels.window.spans import check_windows_2d

WIDEST = 128
"""Widest head that the accumulators of the window kernels hold beside the scores of the series."""
MOST_COORDINATES = 32
"""Most coordinates of the series that they hold besides."""
TURN_WARPS = 8
"""Warps that turn a block of tokens; with four the projection to 32 coordinates spills on sm_100."""


def columns(dtype: torch.dtype) -> int:
    """Columns of a head that are projected at a time; products in full float32 keep whole operands in registers."""
    return 32 if dtype is torch.float32 else 64


def refuse_hybrid_fused(q: Tensor, k: Tensor, v: Tensor, rank: int, terms: int) -> str | None:
    """Say why the kernels cannot compute this call, or ``None``; ``refuse_fused`` has been asked before.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        rank: r, coordinates of the series.
        terms: P.
    """
    if q.dtype is torch.float64:
        return "the kernels compute in float32 and the input is float64; use the blocked form"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        got = f"{q.shape[-1]} and {v.shape[-1]}"
        return f"heads wider than {WIDEST} do not fit its accumulators, got {got}; use the blocked form"
    if rank > MOST_COORDINATES:
        return f"more than {MOST_COORDINATES} coordinates do not fit its accumulators, got {rank}; use the blocked form"
    longest = max(q.shape[2], k.shape[2])
    return refuse_sizes(longest, rank, v.shape[-1], terms=terms, config=TaylorConfig())


def hybrid_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Projection | tuple[Tensor, Tensor],
    near: Near,
    settings: FarSettings,
    key_mask: Tensor | None,
) -> Partial:
    """Compute the shared form of hybrid attention without gradient.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``; masked keys may hold anything.
        v: ``[B, H, Nk, Dv]``.
        low: Bases, or projected queries ``[B, H, Nq, r]`` and keys ``[B, H, Nk, r]``.
        near: Which keys are near.
        settings: Scales, terms, weight and centring.
        key_mask: ``[B, Nk]`` bool or ``None``.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 ``lse``.
    """
    series = None
    if q.numel() > 0:
        tokens = _prepare(q, k, low, settings, key_mask)
        numerator, denominator = taylor_fused_sums(tokens, v, terms=settings.terms)
        series = Series(
            settings.terms,
            settings.weight,
            tokens.keys,
            tokens.turned_q,
            tokens.turned_k,
            tokens.offset,
            tokens.weights,
            numerator,
            denominator,
        )
    if near.window is None:
        grids, radius = check_windows_2d(near.grids, near.keys, near.reach, near.exact_queries)
        return window_fused_2d(
            q, k, v, grids=grids, radius=radius, exact_queries=near.exact_queries, scale=settings.scale,
            key_mask=key_mask, series=series,
        )  # fmt: skip
    return window_fused(
        q, k, v, window=near.window, prefix=near.prefix, chunk=near.chunk, scale=settings.scale, key_mask=key_mask,
        series=series,
    )  # fmt: skip


def _prepare(
    q: Tensor, k: Tensor, low: Projection | tuple[Tensor, Tensor], settings: FarSettings, key_mask: Tensor | None
) -> Tokens:
    """Find means, weights and offsets of whole tokens, and turn projected ones."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    means = find_means(q, k, mask, settings.scale, centred=settings.centred)
    root = math.sqrt(abs(settings.low_scale))
    roots = math.copysign(root, settings.low_scale), root
    bases = (low.q_basis, low.k_basis) if isinstance(low, Projection) else (None, None)
    turned_q, offset = _turn(q, None, means, bases[0], roots[0], settings.scale)
    turned_k, weights = _turn(k, mask, means, bases[1], roots[1], settings.scale, keys=k.shape[2])
    if not isinstance(low, Projection):
        turned_q = _centred(low[0], None, None, q.dtype, roots[0], settings.centred)
        turned_k = _centred(low[1], mask, weights, q.dtype, roots[1], settings.centred)
    return Tokens(turned_q, turned_k, offset, weights, means.total, mask, 1, q.shape[2], k.shape[2])


def _turn(
    x: Tensor, mask: Tensor | None, means: Means, basis: Tensor | None, root: float, scale: float, *, keys: int = 0
) -> tuple[Tensor, Tensor]:
    """Run ``hybrid_turn_kernel`` on queries, or on ``keys`` keys; without a basis the rows are not written."""
    rank = 1 if basis is None else basis.shape[-1]
    rows, dots = new_rows(x, rank, x.dtype)
    mean, direction, shift = means.query, means.key, means.shift
    if keys:
        mean, direction, shift = means.key, means.query, means.shift - math.log(keys)
    source = dots if basis is None else basis.to(torch.float32).contiguous()
    pitch = rows.shape[-1]
    hybrid_turn_kernel[(triton.cdiv(pitch, TOKENS), rows.shape[0])](
        x, x if mask is None else mask, source, mean, direction, shift, rows, dots, *x.stride()[:3],
        0 if mask is None else mask.stride(0), x.shape[1], x.shape[2], pitch, root, scale,
        D=x.shape[-1], BD=mean.shape[-1], BC=min(columns(x.dtype), mean.shape[-1]), BN=TOKENS, RANK=rank,
        BR=padded_width(rank), PROJECT=basis is not None, KEYS=keys > 0, HAS_MASK=mask is not None,
        DTYPE=DTYPES[x.dtype], INTERPRET=interpreted(), num_warps=TURN_WARPS,
    )  # fmt: skip
    return rows, dots


def _centred(
    low: Tensor, mask: Tensor | None, weights: Tensor | None, dtype: torch.dtype, root: float, centred: bool
) -> Tensor:
    """Turn low vectors ``[B, H, N, r]`` less their mean, that of keys under their ``weights`` ``[G, pitch]``."""
    batch, heads, count, rank = low.shape
    low = low if low.stride(-1) == 1 else low.contiguous()
    groups, padded = batch * heads, padded_width(rank)
    mean = low.new_zeros(groups, padded, dtype=torch.float32)
    if centred and weights is None:
        mean[:, :rank] = low.mean(dim=2, dtype=torch.float32).view(groups, rank)
    elif centred and weights is not None:
        kept = low if mask is None else low.masked_fill(mask.view(batch, 1, count, 1) == 0, 0)
        share = weights[:, :count].view(batch, heads, 1, count) / count
        mean[:, :rank] = (share @ kept.to(torch.float32)).view(groups, rank)
    nothing = torch.zeros_like(mean)
    rows, _ = turn_tokens(
        low, mask, mean, nothing, nothing[:, 0].contiguous(), root=root, scale=0.0, keys=False, dtype=dtype
    )
    return rows
