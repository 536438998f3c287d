"""Kernel regression in plain torch, chunked so that memory is bounded by the state and one chunk."""

import torch
from torch import Tensor

from attn_kernels.kernel_regression.normaliser import drop_empty_rows
from attn_kernels.partial import Partial

CHUNK = 1024
"""Tokens handled at a time."""


def kernel_regression_reference(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, *, key_mask: Tensor | None, eps: float, chunk: int = CHUNK
) -> Partial:
    """Compute ``kernel_regression`` in two passes, first over the keys, then over the queries.

    Args:
        phi_q: ``[B, H, Nq, F]``.
        phi_k: ``[B, H, Nk, F]``.
        v: ``[B, H, Nk, Dv]``.
        key_mask: ``[B, Nk]`` bool, True = keep.
        eps: Smallest denominator.
        chunk: Tokens handled at a time.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    wide = torch.promote_types(torch.promote_types(phi_q.dtype, v.dtype), torch.float32)
    state, normaliser = _accumulate(phi_k, v, key_mask, wide, chunk)
    outs, lses = [], []
    for start in range(0, phi_q.shape[2], chunk):
        features = phi_q[:, :, start : start + chunk].to(wide)
        denominator = (features @ normaliser.unsqueeze(-1)).squeeze(-1).clamp_min(eps)
        outs.append((features @ state / denominator.unsqueeze(-1)).to(v.dtype))
        lses.append(denominator.log())
    if not outs:
        batch, heads = phi_q.shape[:2]
        return Partial(v.new_zeros(batch, heads, 0, v.shape[-1]), state.new_zeros(batch, heads, 0))
    return drop_empty_rows(Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2)), key_mask)


def _accumulate(
    phi_k: Tensor, v: Tensor, key_mask: Tensor | None, wide: torch.dtype, chunk: int
) -> tuple[Tensor, Tensor]:
    """Sum keys' features with their values ``[B, H, F, Dv]`` and alone ``[B, H, F]``."""
    batch, heads, keys, features = phi_k.shape
    state = torch.zeros(batch, heads, features, v.shape[-1], dtype=wide, device=v.device)
    normaliser = torch.zeros(batch, heads, features, dtype=wide, device=v.device)
    for start in range(0, keys, chunk):
        key = phi_k[:, :, start : start + chunk].to(wide)
        value = v[:, :, start : start + chunk].to(wide)
        if key_mask is not None:
            drop = ~key_mask[:, None, start : start + chunk, None]
            key = key.masked_fill(drop, 0.0)
            value = value.masked_fill(drop, 0.0)
        state = state + key.transpose(-1, -2) @ value
        normaliser = normaliser + key.sum(dim=2)
    return state, normaliser
