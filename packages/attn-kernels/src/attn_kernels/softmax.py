"""Exact softmax attention: the oracle of every approximation, and a partial like the others."""

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv, resolve_scale
from attn_kernels.partial import Partial


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> Partial:
    """Attend exactly, ``softmax(scale * q k^T + bias) v`` (Vaswani et al. 2017, eq. 1), accumulated in float32.

    Written for clarity and used as the oracle: it materialises the ``[B, H, Nq, Nk]`` scores. Float64 input stays
    float64.

    Args:
        q: ``[B, H, Nq, D]``, after RoPE.
        k: ``[B, H, Nk, D]``, after RoPE.
        v: ``[B, H, Nk, Dv]``.
        scale: Score scale; ``1 / sqrt(D)`` if ``None``.
        key_mask: ``[B, Nk]`` bool, True = keep. A query whose keys are all masked gets zeros and ``lse`` ``-inf``.
        attn_bias: Added to the scaled scores; broadcastable to ``[B, H, Nq, Nk]``.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v`` and float32 (or float64) ``lse``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    check_qkv(q, k, v)
    check_key_mask(key_mask, k)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = resolve_scale(scale, q.shape[-1]) * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if attn_bias is not None:
        scores = scores + attn_bias.to(wide)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return attend_scores(scores, v)


def attend_scores(scores: Tensor, v: Tensor) -> Partial:
    """Softmax finished scores over their last axis and apply them to the values.

    Args:
        scores: ``[B, H, Nq, Nk]``, float32 or float64; ``-inf`` removes a key.
        v: ``[B, H, Nk, Dv]``.

    Returns:
        ``Partial``; zeros and ``-inf`` for a query without keys.
    """
    lse = torch.logsumexp(scores, dim=-1)
    # exp(-inf - -inf) is NaN; a query without keys gets zero weights instead.
    shift = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    weights = torch.exp(scores - shift.unsqueeze(-1))
    return Partial((weights @ v.to(scores.dtype)).to(v.dtype), lse)
