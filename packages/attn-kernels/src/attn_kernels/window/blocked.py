"""Window attention block by block: dense attention of a few queries to the keys around them, in bounded memory."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.partial import Partial
from attn_kernels.softmax import attend_scores
from attn_kernels.window.spans import WindowBlock


def window_blocked(
    q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[WindowBlock], *, scale: float, key_mask: Tensor | None
) -> Partial:
    """Attend block by block, without gradient; half precision is computed in float32.

    Beyond inputs and outputs, memory holds the queries, keys and values of one block and its mask (and its scores
    where torch has no fused attention that answers the normaliser, that is off the CPU).

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        blocks: Blocks that hold every query once.
        scale: Score scale.
        key_mask: ``[B, Nk]`` bool, True = keep. A masked key may hold anything, NaN too.

    Returns:
        ``Partial``; zeros and ``-inf`` for a query that sees no kept key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=wide)
    with torch.no_grad():
        for block in blocks:
            queries, keys, values = (
                x.index_select(2, rows).to(wide) for x, rows in ((q, block.queries), (k, block.keys), (v, block.keys))
            )
            keep = block.keep
            if key_mask is not None:
                kept = key_mask.index_select(1, block.keys)[:, None, :, None]
                keys, values = keys.masked_fill_(~kept, 0), values.masked_fill_(~kept, 0)
                keep = kept.transpose(-1, -2) if keep is None else kept.transpose(-1, -2) & keep
            part = _attend(queries, keys, values, keep, scale)
            out.index_copy_(2, block.queries, part.out.to(out.dtype))
            lse.index_copy_(2, block.queries, part.lse)
    return Partial(out, lse)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None, scale: float) -> Partial:
    """Attend to the kept keys of a block.

    Args:
        queries: ``[B, H, n, D]``.
        keys: ``[B, H, m, D]``.
        values: ``[B, H, m, Dv]``.
        keep: ``[..., n or 1, m]`` bool, broadcastable to the scores, or ``None``.
        scale: Score scale.
    """
    if keys.shape[2] == 0:
        return Partial(
            values.new_zeros(*queries.shape[:3], values.shape[-1]), queries.new_full(queries.shape[:3], -torch.inf)
        )
    bias = None if keep is None else queries.new_zeros(keep.shape).masked_fill_(~keep, -torch.inf)
    if not _has_flash(queries):
        scores = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale)
        return attend_scores(scores if bias is None else scores.add_(bias), values)
    width = max(keys.shape[-1], values.shape[-1])
    # The kernel wants keys and values of one width; zero columns change nothing.
    padded = [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (queries, keys, values)]
    if bias is not None:
        bias = bias.view((1,) * (4 - bias.ndim) + bias.shape)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*padded, attn_mask=bias, scale=scale)
    if bias is not None:
        # A query without keys gets zeros, but the normaliser of one key of score 0.
        lse = lse.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf)
    return Partial(out[..., : values.shape[-1]], lse)


def _has_flash(queries: Tensor) -> bool:
    """Tell whether torch has a fused attention here that takes a bias and answers the normaliser too."""
    return queries.device.type == "cpu"
