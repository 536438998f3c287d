"""Exact softmax over a subset of the keys, and over keys that stand for tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.landmark.blocked import landmark_blocked
from attn_kernels.landmark.pooled import landmark_set
from attn_kernels.landmark.reference import landmark_reference
from attn_kernels.partial import Partial
from attn_kernels.triton_support import refuse_fused

CHUNK = 512
"""Queries handled at a time: the scores of one chunk bound the memory."""


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    chunk: int = CHUNK,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend exactly to the landmark keys and to no others.

    Memory is bounded by the gathered keys and ``[B, H, chunk, M]`` scores for M landmarks, in the backward pass too;
    the fused form needs neither.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        index: ``[M]`` int64, positions of the landmarks among the keys, each at most once.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. A row none of whose landmarks is kept gets zeros and ``lse`` ``-inf``.
        chunk: Queries handled at a time.
        impl: ``"fused"`` (Triton), ``"blocked"`` (torch's fused attention on a CPU), ``"reference"`` (differentiable),
            or ``"auto"``: the first of these that can run here.

    Returns:
        ``Partial`` over the landmarks; all keys as landmarks is exact attention.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, ``chunk`` is not positive, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    _check_index(index)
    scale, chosen = resolve_scale(scale, q.shape[-1]), _choose(impl, q, k, v, chunk)
    bias = None
    if key_mask is not None:
        kept = key_mask.index_select(1, index)
        dtype = torch.promote_types(q.dtype, torch.float32)
        bias = torch.zeros(kept.shape, dtype=dtype, device=q.device).masked_fill(~kept, -torch.inf)
    if chosen is Impl.FUSED:
        from attn_kernels.landmark.fused import landmark_fused

        return landmark_fused(q, k, v, bias, index=index, scale=scale)
    form = landmark_blocked if chosen is Impl.BLOCKED else landmark_reference
    return form(q, k.index_select(2, index), v.index_select(2, index), bias, scale=scale, chunk=chunk)


def pooled_landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grids: Sequence[TokenGrid],
    tile: int | tuple[int, int] = 4,
    index: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    chunk: int = CHUNK,
    impl: Impl | str = Impl.AUTO,
) -> Partial:
    """Attend to the tokens outside the grids, to chosen tokens, and to every tile of the grids as one key.

    One softmax holds them all: a tile's mean key with the logarithm of the number of its tokens added to the score,
    and its mean value (``pooled_landmarks``). Tiles of one token make it exact attention.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        grids: Grids of image tokens among the keys.
        tile: Tokens along a side of a tile, or ``(rows, columns)``; edge tiles may be smaller.
        index: ``[M]`` int64, tokens of the grids that stay exact, each at most once; they leave their tile's means.
            One outside the grids is exact anyway and counts once. ``None`` = none.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. Masked tokens leave means and counts; a row without keys gets zeros and
            ``lse`` ``-inf``.
        chunk: Queries handled at a time.
        impl: As in ``landmark_attention``.

    Returns:
        ``Partial`` over all keys.

    Raises:
        ValueError: Shapes, dtypes, devices or grids do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    if index is not None:
        _check_index(index)
    scale, chosen = resolve_scale(scale, q.shape[-1]), _choose(impl, q, k, v, chunk)
    keys, values, bias = landmark_set(k, v, grids=grids, tile=tile, index=index, key_mask=key_mask)
    if chosen is Impl.FUSED:
        from attn_kernels.landmark.fused import landmark_fused

        return landmark_fused(q, keys, values, bias, index=None, scale=scale)
    form = landmark_blocked if chosen is Impl.BLOCKED else landmark_reference
    return form(q, keys, values, bias, scale=scale, chunk=chunk)


def _check_index(index: Tensor) -> None:
    """Check the positions of landmarks."""
    if index.ndim != 1 or index.dtype is not torch.int64 or index.numel() == 0:
        raise ValueError(f"index must be int64 [M] with M >= 1, got {index.dtype} {tuple(index.shape)}")


def _choose(impl: Impl | str, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Impl:
    """Pick the implementation."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    gradient = None
    if torch.is_grad_enabled() and max(x.requires_grad for x in (q, k, v)):
        gradient = "it has no gradient and an input requires one; use the reference, or torch.no_grad()"
    fused = gradient or refuse_fused(impl, q, k, v)
    if fused is None:
        from attn_kernels.landmark.fused import refuse_landmark_fused

        fused = refuse_landmark_fused(q, v)
    return resolve_impl(impl, {Impl.FUSED: fused, Impl.BLOCKED: gradient, Impl.REFERENCE: None})
