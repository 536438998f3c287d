"""Attention through feature maps in plain torch; the features of one chunk at a time are alive, also in backward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attn_kernels.kernel_regression.feature_map import FeatureMap, map_features
from attn_kernels.kernel_regression.normaliser import divide, drop_empty_rows, key_shift, query_shift
from attn_kernels.partial import Partial

CHUNK = 1024
"""Tokens handled at a time."""


def feature_map_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: FeatureMap,
    map_k: FeatureMap,
    *,
    key_mask: Tensor | None,
    eps: float,
    map_dtype: torch.dtype | None,
    chunk: int = CHUNK,
) -> Partial:
    """Compute ``feature_map_attention`` in two passes, first over the keys, then over the queries.

    Arguments as in ``feature_map_attention``, checked. Where a gradient is wanted each chunk is computed again in the
    backward pass, so that nothing between inputs and outputs is kept but the state.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, keys, _ = k.shape
    tensors = (q, k, v, *map_q.weights, *map_k.weights)
    wants_gradient = torch.is_grad_enabled() and max(tensor.requires_grad for tensor in tensors)
    run: Callable[..., tuple[Tensor, Tensor]] = (
        partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if wants_gradient else _call
    )
    shift = key_shift(k, map_k, key_mask=key_mask, map_dtype=map_dtype, chunk=chunk)
    state = torch.zeros(batch, heads, map_k.features, v.shape[-1], dtype=wide, device=v.device)
    normaliser = torch.zeros(batch, heads, map_k.features, dtype=wide, device=v.device)
    for start in range(0, keys, chunk):
        some = slice(start, start + chunk)
        mask = None if key_mask is None else key_mask[:, some]
        add = run(_sum_keys, k[:, :, some], v[:, :, some], mask, shift, map_k, map_dtype)
        state, normaliser = state + add[0], normaliser + add[1]
    outs, lses = [v.new_zeros(batch, heads, 0, v.shape[-1])], [state.new_zeros(batch, heads, 0)]
    for rows in torch.split(q, chunk, dim=2):
        out, lse = run(_read, rows, state, normaliser, shift, map_q, eps, map_dtype)
        outs.append(out.to(v.dtype))
        lses.append(lse)
    return drop_empty_rows(Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2)), key_mask)


def _call(function: Callable[..., tuple[Tensor, Tensor]], *args: object) -> tuple[Tensor, Tensor]:
    """Call a function as ``checkpoint`` would."""
    return function(*args)


def _sum_keys(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    shift: Tensor | None,
    map_k: FeatureMap,
    map_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Sum the features of a chunk of keys with their values ``[B, H, F, Dv]`` and alone ``[B, H, F]``."""
    wide = torch.promote_types(k.dtype, torch.float32)
    keys, values = k.to(wide), v.to(wide)
    if mask is not None:
        drop = ~mask[:, None, :, None]
        # Masked keys may hold anything; it must reach neither the sums nor the gradients of the weights.
        keys, values = keys.masked_fill(drop, 0.0), values.masked_fill(drop, 0.0)
    features = map_features(map_k, keys, shift=shift, map_dtype=map_dtype)
    if mask is not None:
        features = features.masked_fill(drop, 0.0)
    return features.transpose(-1, -2) @ values, features.sum(dim=2)


def _read(
    q: Tensor,
    state: Tensor,
    normaliser: Tensor,
    shift: Tensor | None,
    map_q: FeatureMap,
    eps: float,
    map_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Read the state out by a chunk of queries: ``out`` ``[B, H, n, Dv]`` and ``lse`` ``[B, H, n]``."""
    x = q.to(state.dtype)
    own = query_shift(x, map_q, shift, map_dtype)
    if shift is None or own is None:
        features, total = map_features(map_q, x, map_dtype=map_dtype), None
    else:
        features, total = map_features(map_q, x, shift=own - shift, map_dtype=map_dtype), own.squeeze(-1)
    denominator = (features @ normaliser.unsqueeze(-1)).squeeze(-1)
    return divide(features @ state, denominator, total, eps)
