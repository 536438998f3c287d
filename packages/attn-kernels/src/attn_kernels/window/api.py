"""Window attention: exact, but only to the tokens near by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.partial import Partial
from attn_kernels.triton_support import refuse_fused
from attn_kernels.window.blocked import window_blocked
from attn_kernels.window.reference import window_reference
from attn_kernels.window.spans import (
    OutsideQueries,
    check_window,
    check_windows_2d,
    window_blocks,
    window_blocks_2d,
    window_mask,
    window_mask_2d,
)

_WIDEST = 256
"""Widest head that the kernels' accumulators hold."""


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    prefix: int = 0,
    chunk: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend to the keys within ``window`` places of the query, and to the first ``prefix`` keys, in one softmax.

    Query i sees key j if ``|i - j| <= window`` or ``j < prefix``; a key of both counts once. Queries inside the
    prefix have the same rule: they see the prefix and their window, nothing else. Kin of the sliding window with
    global tokens of Beltagy et al. 2020, "Longformer", section 3.1. ``window >= max(Nq, Nk)`` is exact attention.

    With ``chunk > 1`` the queries ``[c chunk, (c + 1) chunk)`` share one window, the union of their own: keys from
    ``c chunk - window`` to ``min((c + 1) chunk, Nq) - 1 + window``. Then ``window`` is a radius around the chunk.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE. Query i and key i are the same place, also where Nq and Nk differ.
        v: ``[B, H, Nk, Dv]``.
        window: Radius in tokens of the sequence; 0 = the token itself. A flattened image is not two-dimensional here:
            see ``window_attention_2d``.
        prefix: Leading keys (text) that every query sees.
        chunk: Queries that share one window.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. A masked key may hold anything, NaN too.
        query_positions: ``[n]`` int64, the places of the rows of q, for training on sampled queries; reference only.
            Chunks then end where they would if q held a query for every key. ``None`` = ``0 .. Nq - 1``.
        impl: ``"reference"`` (differentiable, quadratic memory), ``"blocked"`` (memory linear in N), ``"fused"``
            (Triton), or ``"auto"``.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``; zeros and
        ``-inf`` for a query that sees no kept key. A value that is not finite reaches every query that sees it, and
        may reach others nearby.

    Raises:
        ValueError: Shapes, dtypes, devices or numbers do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    check_window(window, prefix, chunk)
    _check_positions(q, query_positions)
    scale = resolve_scale(scale, q.shape[-1])
    queries, keys = q.shape[2], k.shape[2]
    chosen = _choose(impl, q, k, v, key_mask, query_positions)
    if chosen is Impl.FUSED:
        from attn_kernels.window.fused import window_fused

        return window_fused(q, k, v, window=window, prefix=prefix, chunk=chunk, scale=scale, key_mask=key_mask)
    if chosen is Impl.BLOCKED:
        blocks = window_blocks(queries, keys, window=window, prefix=prefix, chunk=chunk, device=q.device)
        return window_blocked(q, k, v, blocks, scale=scale, key_mask=key_mask)
    seen = window_mask(
        queries if query_positions is None else keys,
        keys,
        window=window,
        prefix=prefix,
        chunk=chunk,
        query_positions=query_positions,
        device=q.device,
    )
    return window_reference(q, k, v, seen, scale=scale, key_mask=key_mask)


def window_attention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: Sequence[TokenGrid],
    radius: int | tuple[int, int],
    exact_queries: OutsideQueries = "exact",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend to the tokens of the query's grid near by in two dimensions, and to all tokens outside the grids.

    The query at (row, column) of a grid sees the token at (r, c) of the same grid if ``|row - r| <= radius[0]`` and
    ``|column - c| <= radius[1]``. Exact attention where the radius covers a single grid. Kin of neighbourhood
    attention (Hassani et al. 2023, eq. 2), but windows are cut at the border, not shifted inwards.

    Args:
        q: ``[B, H, N, D]``, after RoPE.
        k: ``[B, H, N, D]``, after RoPE.
        v: ``[B, H, N, Dv]``.
        grids: Grids of image tokens in raster order; a video is one grid per frame, and frames do not see each other.
        radius: Reach in tokens, or ``(rows, columns)``; 0 = the token itself.
        exact_queries: What queries outside every grid (text) see: ``"exact"`` every key, ``"local"`` the tokens
            outside the grids.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, N]`` bool, True = keep. A masked key may hold anything, NaN too.
        query_positions: ``[n]`` int64, the places of the rows of q among the keys, for training on sampled queries;
            reference only. ``None`` = all, and q and k must have the same number of tokens.
        impl: As in ``window_attention``.

    Returns:
        ``Partial`` as in ``window_attention``.

    Raises:
        ValueError: Shapes, dtypes, devices, grids or numbers do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    _check_positions(q, query_positions)
    length = k.shape[2]
    if query_positions is None and q.shape[2] != length:
        raise ValueError(
            f"window_attention_2d needs a query per key, got q {tuple(q.shape)} and k {tuple(k.shape)}; "
            "name the rows of q with query_positions"
        )
    grids, reach = check_windows_2d(grids, length, radius, exact_queries)
    scale = resolve_scale(scale, q.shape[-1])
    chosen = _choose(impl, q, k, v, key_mask, query_positions)
    if chosen is Impl.FUSED:
        from attn_kernels.window.fused import window_fused_2d

        return window_fused_2d(
            q, k, v, grids=grids, radius=reach, exact_queries=exact_queries, scale=scale, key_mask=key_mask
        )
    if chosen is Impl.BLOCKED:
        blocks = window_blocks_2d(length, grids=grids, radius=reach, exact_queries=exact_queries, device=q.device)
        return window_blocked(q, k, v, blocks, scale=scale, key_mask=key_mask)
    seen = window_mask_2d(
        length,
        grids=grids,
        radius=reach,
        exact_queries=exact_queries,
        query_positions=query_positions,
        device=q.device,
    )
    return window_reference(q, k, v, seen, scale=scale, key_mask=key_mask)


def _choose(
    impl: Impl | str, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_positions: Tensor | None
) -> Impl:
    """Pick the implementation, or raise with the reason why the one asked for cannot run."""
    reason = None
    if query_positions is not None:
        reason = "it needs the queries of all tokens, and query_positions names some"
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        reason = "it has no gradient and an input requires one; use the reference, or torch.no_grad()"
    fused = reason or refuse_fused(impl, q, k, v, *(() if key_mask is None else (key_mask,)))
    if fused is None and q.dtype is torch.float64:
        fused = "the kernels compute in float32 and the input is float64; use the blocked form"
    if fused is None and max(q.shape[-1], v.shape[-1]) > _WIDEST:
        fused = f"heads wider than {_WIDEST} do not fit its accumulators, got {q.shape[-1]} and {v.shape[-1]}"
    return resolve_impl(impl, {Impl.FUSED: fused, Impl.BLOCKED: reason, Impl.REFERENCE: None})


def _check_positions(q: Tensor, query_positions: Tensor | None) -> None:
    """Check that every row of q has a position."""
    if query_positions is not None and (
        query_positions.dtype is not torch.int64 or tuple(query_positions.shape) != (q.shape[2],)
    ):
        raise ValueError(
            f"query_positions must be int64 [Nq] = ({q.shape[2]},), "
            f"got {query_positions.dtype} {tuple(query_positions.shape)}"
        )
