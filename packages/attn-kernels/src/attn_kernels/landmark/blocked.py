"""Attention to a few keys, each with its own bias, through torch's fused attention where it answers the normaliser."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.landmark.reference import landmark_reference
from attn_kernels.partial import Partial


def landmark_blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, chunk: int) -> Partial:
    """Attend without gradient and, on a CPU, without scores in memory; half precision is computed in float32 there.

    Elsewhere than on a CPU it is the reference.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, M, D]``.
        v: ``[B, H, M, Dv]``.
        bias: ``[B, M]``, added to the scores; ``-inf`` removes a key, which may then hold anything. ``None`` = 0.
        scale: Score scale.
        chunk: Queries handled at a time by the reference.

    Returns:
        ``Partial``; zeros and ``-inf`` for a row whose keys are all removed.
    """
    with torch.no_grad():
        if q.device.type != "cpu" or q.shape[2] == 0:
            return landmark_reference(q, k, v, bias, scale=scale, chunk=chunk)
        dtype, values = torch.promote_types(q.dtype, torch.float32), v.shape[-1]
        width = max(q.shape[-1], values)
        # The kernel wants equal widths; zero columns change nothing.
        queries, keys, rows = (F.pad(x, (0, width - x.shape[-1])).to(dtype) for x in (q, k, v))
        if bias is not None:
            gone = (bias == -torch.inf)[:, None, :, None]
            keys, rows = keys.masked_fill(gone, 0), rows.masked_fill(gone, 0)
            bias = bias.to(dtype)[:, None, None, :]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(queries, keys, rows, attn_mask=bias, scale=scale)
        if bias is not None:
            # The kernel answers a query without keys with zeros, but with the normaliser of one key of score 0.
            lse = lse.masked_fill(bias.amax(dim=-1) == -torch.inf, -torch.inf)
        return Partial(out[..., :values].to(v.dtype), lse)
