"""Taylor attention arranged for speed and bounded memory, on any device and without gradient.

A few heads at a time, in chunks of tokens whose features fit a cache. Features are made in rows along the tokens, as
products of slices; the values stand beside a row of the key weights, so that the denominator comes with the sums; the
weights of the features are applied to the sums, never to a token. With four terms or more the last factor of a feature
multiplies the values of a key and the sums of a query, so that only monomials of degree ``P - 2`` are made.
"""

from itertools import product

import torch
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.full import FullPath
from attn_kernels.taylor.heads import Heads
from attn_kernels.taylor.plan import make_plan
from attn_kernels.taylor.readout import blocks_lse
from attn_kernels.taylor.streaming import StreamingPath


def taylor_blocked(
    q: Tensor, k: Tensor, v: Tensor, *, terms: int, scale: float, key_mask: Tensor | None, config: TaylorConfig
) -> Partial:
    """Compute Taylor attention chunk by chunk; half precision is computed in float32.

    Arguments as in ``taylor_attention``, checked and resolved.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    batch, count, queries, _ = q.shape
    width, columns = q.shape[-1] // config.blocks, v.shape[-1] // config.blocks
    wide = torch.promote_types(q.dtype, torch.float32)
    plan = make_plan(
        heads=count,
        tokens=max(queries, k.shape[2]),
        width=width,
        value_width=columns,
        terms=terms,
        itemsize=wide.itemsize,
        device=q.device.type,
        config=config,
    )
    with torch.no_grad():
        out = v.new_empty(batch, count, queries, v.shape[-1])
        lses = [q.new_empty(batch, count, queries, dtype=wide) for _ in range(config.blocks)]
        path = StreamingPath(plan) if plan.streaming else FullPath(plan)
        for row, block, first in product(range(batch), range(config.blocks), range(0, count, plan.heads)):
            some = slice(first, first + plan.heads)
            narrow, wide_columns = (slice(block * size, (block + 1) * size) for size in (width, columns))
            heads = Heads.prepare(
                (q[row, some, :, narrow], k[row, some, :, narrow], v[row, some, :, wide_columns]),
                None if key_mask is None else key_mask[row],
                (out[row, some, :, wide_columns], lses[block][row, some]),
                terms=terms,
                scale=scale,
                config=config,
                chunk=plan.tokens,
            )
            path.attend(heads)
        return Partial(out, lses[0] if len(lses) == 1 else blocks_lse(lses))
