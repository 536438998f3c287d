"""Window attention in plain torch: softmax over a mask. Differentiable, quadratic memory."""

import torch
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.softmax import attend_scores


def window_reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float, key_mask: Tensor | None
) -> Partial:
    """Attend to the keys that a mask names.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        seen: ``[Nq, Nk]`` bool, True where the query sees the key.
        scale: Score scale.
        key_mask: ``[B, Nk]`` bool, True = keep. A masked key may hold anything, NaN too.

    Returns:
        ``Partial``; zeros and ``-inf`` for a query that sees no kept key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    kept = seen
    if key_mask is not None:
        kept = seen & key_mask[:, None, None, :]
        k, v = (torch.where(key_mask[:, None, :, None], each, 0) for each in (k, v))
    scores = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    part = attend_scores(scores.masked_fill(~kept, -torch.inf), v.to(wide))
    return Partial(part.out.to(v.dtype), part.lse)
