"""Attention to a few keys, each with its own bias, in plain torch; one chunk of queries at a time has scores."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_kernels.partial import Partial
from attn_kernels.softmax import attend_scores


def landmark_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, chunk: int) -> Partial:
    """Attend exactly to biased keys; differentiable, each chunk computed again in the backward pass.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, M, D]``.
        v: ``[B, H, M, Dv]``.
        bias: ``[B, M]`` float32 (float64 for float64), added to the scores; ``-inf`` removes a key, which may then
            hold anything. ``None`` = 0.
        scale: Score scale.
        chunk: Queries handled at a time.

    Returns:
        ``Partial``; zeros and ``-inf`` for a row whose keys are all removed.
    """
    if bias is not None:
        gone = (bias == -torch.inf)[:, None, :, None]
        k, v = k.masked_fill(gone, 0), v.masked_fill(gone, 0)
    wants_gradient = torch.is_grad_enabled() and max(x.requires_grad for x in (q, k, v))
    run: Callable[..., Partial] = (
        partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if wants_gradient else _call
    )
    parts = [run(_attend, rows, k, v, bias, scale) for rows in torch.split(q, chunk, dim=2)]
    return Partial(torch.cat([part.out for part in parts], dim=2), torch.cat([part.lse for part in parts], dim=2))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Partial:
    """Attend from one chunk of queries."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(wide)[:, None, None, :]
    return attend_scores(scores, v)


def _call(function: Callable[..., Partial], *args: object) -> Partial:
    """Call a function as ``checkpoint`` would."""
    return function(*args)
