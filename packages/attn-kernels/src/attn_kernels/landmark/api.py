"""Exact softmax over a subset of the keys."""

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.partial import Partial
from attn_kernels.softmax import softmax_attention

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
) -> Partial:
    """Attend exactly to the landmark keys and to no others.

    Memory is bounded by the gathered keys and ``[B, H, chunk, M]`` scores for M landmarks.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        index: ``[M]`` int64, positions of the landmarks among the keys, each at most once.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. A row none of whose landmarks is kept gets zeros and ``lse`` ``-inf``.
        chunk: Queries handled at a time.

    Returns:
        ``Partial`` over the landmarks; all keys as landmarks is exact attention.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``chunk`` is not positive.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    scale = resolve_scale(scale, q.shape[-1])
    if index.ndim != 1 or index.dtype is not torch.int64 or index.numel() == 0:
        raise ValueError(f"index must be int64 [M] with M >= 1, got {index.dtype} {tuple(index.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    keys, values = k.index_select(2, index), v.index_select(2, index)
    mask = None if key_mask is None else key_mask.index_select(1, index)
    parts = [softmax_attention(rows, keys, values, scale=scale, key_mask=mask) for rows in torch.split(q, chunk, dim=2)]
    return Partial(torch.cat([part.out for part in parts], dim=2), torch.cat([part.lse for part in parts], dim=2))
