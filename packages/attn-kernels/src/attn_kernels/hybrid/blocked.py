"""Hybrid attention in time linear in the tokens: the series over all keys, corrected block by block near by."""

from collections.abc import Iterable

import torch
from torch import Tensor

from attn_kernels.hybrid.far import FarField, finish
from attn_kernels.partial import Partial
from attn_kernels.window import WindowBlock

_CPU_BYTES = 1 << 20
"""Bytes of features of one head held at a time, little enough to stay in a CPU's caches."""
_DEVICE_BYTES = 1 << 28
"""Bytes of features of all heads held at a time on an accelerator."""


def hybrid_blocked(
    q: Tensor, k: Tensor, v: Tensor, far: FarField, blocks: Iterable[WindowBlock], *, scale: float
) -> Partial:
    """Compute the shared form of hybrid attention without gradient; half precision is computed in float32.

    ``num_i = phi(q_i) S + sum_near (exp(s_ij) - far_ij) v_j`` and the same for the denominator, both divided by the
    largest factor. Beyond inputs and outputs memory holds the low vectors, the sums over the keys ``[B, H, R, Dv + 1]``
    and read by the queries ``[B, H, Nq, Dv + 1]``, the features of a chunk, and the scores of one block.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``; masked keys may hold anything.
        v: ``[B, H, Nk, Dv]``.
        far: The far part.
        blocks: Near pairs, every query in one block.
        scale: Score scale.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    with torch.no_grad():
        wide = far.q_low.dtype
        sums = _far_sums(v, far)
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        for block in blocks:
            part = _correct(q, k, v, far, sums, block, scale)
            out.index_copy_(2, block.queries, part.out)
            lse.index_copy_(2, block.queries, part.lse)
    return Partial(out, lse)


def _far_sums(v: Tensor, far: FarField) -> Tensor:
    """Sum the series over all keys for each query, with values and alone: ``[B, H, Nq, Dv + 1]``."""
    wide, weights = far.q_low.dtype, far.feature_weights()
    batch, heads, queries, _ = far.q_low.shape
    keys, columns, features = v.shape[2], v.shape[3] + 1, len(weights)
    together = 1 if v.device.type == "cpu" else heads
    room = _CPU_BYTES if v.device.type == "cpu" else _DEVICE_BYTES
    chunk = max(64, room // (features * wide.itemsize * together))
    sums = torch.empty(batch, heads, queries, columns, dtype=wide, device=v.device)
    for first in range(0, heads, together):
        some = slice(first, first + together)
        state = torch.zeros(batch, together, features, columns, dtype=wide, device=v.device)
        for start in range(0, keys, chunk):
            part = slice(start, min(start + chunk, keys))
            value = v[:, some, part].to(wide)
            if far.keep is not None:
                value = value.masked_fill(~far.keep[..., part, None], 0)
            weighted = torch.empty(*value.shape[:3], columns, dtype=wide, device=v.device)
            key_weights = far.key_weights[:, some, part].unsqueeze(-1)
            torch.mul(value, key_weights, out=weighted[..., :-1])
            weighted[..., -1:] = key_weights
            state += torch.matmul(far.features(far.k_low[:, some, part]), weighted)
        state *= weights
        for start in range(0, queries, chunk):
            part = slice(start, min(start + chunk, queries))
            sums[:, some, part] = far.features(far.q_low[:, some, part]).transpose(-1, -2) @ state
    return sums


def _correct(q: Tensor, k: Tensor, v: Tensor, far: FarField, sums: Tensor, block: WindowBlock, scale: float) -> Partial:
    """Replace what the series says of the near pairs of a block by the exponentials, and divide."""
    wide = sums.dtype
    rows, places = block.queries, block.keys
    queries, keys, values = (x.index_select(2, at).to(wide) for x, at in ((q, rows), (k, places), (v, places)))
    keep = block.keep
    if far.keep is not None:
        kept = far.keep.index_select(2, places)
        keys, values = keys.masked_fill(~kept.unsqueeze(-1), 0), values.masked_fill(~kept.unsqueeze(-1), 0)
        keep = kept.unsqueeze(-2) if keep is None else keep & kept.unsqueeze(-2)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale)  # [B, H, n, m]
    if keep is not None:
        scores.masked_fill_(~keep, -torch.inf)
    offset = far.offset.index_select(2, rows)
    largest = scores.amax(dim=-1) if len(places) else torch.full_like(offset, -torch.inf)
    peak = torch.maximum(largest, offset)
    factor = torch.exp(offset - peak).unsqueeze(-1)
    low = torch.matmul(far.q_low.index_select(2, rows), far.k_low.index_select(2, places).transpose(-1, -2))
    low = far.series(low).mul_(far.key_weights.index_select(2, places).unsqueeze(-2)).mul_(factor)
    if keep is not None:
        low.masked_fill_(~keep, 0)
    weights = scores.sub_(peak.unsqueeze(-1)).exp_().sub_(low)
    total = sums.index_select(2, rows) * factor
    numerator = total[..., :-1] + torch.matmul(weights, values)
    return finish(numerator, total[..., -1] + weights.sum(dim=-1), peak, v.dtype)
