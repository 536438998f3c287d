"""Hybrid attention pair by pair: a weight for each query and key, exact near by and from the series elsewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

from attn_kernels.hybrid.far import FarField, finish
from attn_kernels.partial import Partial

CHUNK = 256
"""Queries whose weights exist at a time without a gradient."""


def hybrid_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: FarField,
    seen: Callable[[Tensor], Tensor],
    *,
    scale: float,
    chunk: int = CHUNK,
) -> Partial:
    """Compute the shared form of hybrid attention; differentiable, quadratic time.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``; masked keys may hold anything.
        v: ``[B, H, Nk, Dv]``.
        far: The far part.
        seen: Answers for positions ``[n]`` of queries which keys are near, ``[n, Nk]`` bool.
        scale: Score scale.
        chunk: Queries handled at a time.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    wide = far.q_low.dtype
    keys, values = k.to(wide), v.to(wide)
    if far.keep is not None:
        drop = ~far.keep.unsqueeze(-1)
        keys, values = keys.masked_fill(drop, 0), values.masked_fill(drop, 0)
    outs = [v.new_zeros(*q.shape[:2], 0, v.shape[-1])]
    lses = [far.offset.new_zeros(*q.shape[:2], 0)]
    for start in range(0, q.shape[2], chunk):
        rows = slice(start, min(start + chunk, q.shape[2]))
        near = seen(torch.arange(rows.start, rows.stop, device=q.device))
        if far.keep is not None:
            near = near & far.keep.unsqueeze(-2)
        scores = scale * (q[:, :, rows].to(wide) @ keys.transpose(-1, -2))
        exact = scores.masked_fill(~near, -torch.inf)
        offset = far.offset[:, :, rows]
        peak = torch.maximum(exact.detach().amax(dim=-1), offset.detach())
        low = far.series(far.q_low[:, :, rows] @ far.k_low.transpose(-1, -2))
        beyond = torch.exp(offset - peak).unsqueeze(-1) * far.key_weights.unsqueeze(-2) * low
        weights = torch.where(near, torch.exp(exact - peak.unsqueeze(-1)), beyond)
        part = finish(weights @ values, weights.sum(dim=-1), peak, v.dtype)
        outs.append(part.out)
        lses.append(part.lse)
    return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2))
