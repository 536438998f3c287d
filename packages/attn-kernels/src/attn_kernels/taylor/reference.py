"""Taylor attention in clear torch: features of the keys, their sums, and what the queries read from them."""

import torch
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.taylor.centring import Centring, centre, key_covariance
from attn_kernels.taylor.coefficients import hermite_factors, logit_variance
from attn_kernels.taylor.config import TaylorConfig
from attn_kernels.taylor.features import (
    constant_counts,
    feature_weights,
    monomials,
    taylor_feature_count,
    unrank_multisets,
    with_constant,
)
from attn_kernels.taylor.readout import join_blocks, normalise

_FEATURES_AT_ONCE = 1 << 22
"""Elements of features of one head that are held at a time."""


def taylor_reference(
    q: Tensor, k: Tensor, v: Tensor, *, terms: int, scale: float, key_mask: Tensor | None, config: TaylorConfig
) -> Partial:
    """Compute Taylor attention, differentiably; the path and chunk sizes of ``config`` do not concern it.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``.
        v: ``[B, H, Nk, Dv]``.
        terms: P.
        scale: Score scale.
        key_mask: ``[B, Nk]`` bool, True = keep.
        config: How the series is expanded.

    Returns:
        ``Partial`` with ``out`` ``[B, H, Nq, Dv]`` in the dtype of ``v``.
    """
    keep = None if key_mask is None else key_mask[:, None]
    width, columns = q.shape[-1] // config.blocks, v.shape[-1] // config.blocks
    parts = []
    for block in range(config.blocks):
        some = slice(block * width, (block + 1) * width)
        values = v[..., block * columns : (block + 1) * columns]
        parts.append(_attend(q[..., some], k[..., some], values, terms, scale, keep, config))
    return join_blocks(parts)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, terms: int, scale: float, keep: Tensor | None, config: TaylorConfig
) -> Partial:
    """Attend one block of columns; ``keep`` is ``[B, 1, Nk]``."""
    centring = centre(q, k, scale=scale, keep=keep, enabled=config.centre)
    wide = centring.weights.dtype
    ranks = torch.arange(taylor_feature_count(q.shape[-1], terms), device=q.device)
    indices = unrank_multisets(ranks, q.shape[-1] + 1, terms - 1)
    weights = feature_weights(indices, scale, wide).unsqueeze(-1)
    chunk = max(1, _FEATURES_AT_ONCE // len(ranks))
    state = weights * _sum_keys(k, v, terms, centring, keep, chunk)

    covariance = key_covariance(k, centring, keep=keep) if config.coefficients == "hermite" else None
    constants = constant_counts(indices)
    outs, lses = [], []
    for start in range(0, q.shape[2], chunk):
        query = (q[:, :, start : start + chunk].to(wide) - centring.query_mean).transpose(-1, -2)
        features = monomials(with_constant(query), terms - 1)
        offset = centring.shift + scale * (centring.key_mean @ query).squeeze(-2)
        if covariance is not None:
            variance = logit_variance(query, covariance, scale)
            factors, log_gain = hermite_factors(variance, terms, config.hermite_limit)
            features = features * factors[:, :, constants]
            offset = offset + log_gain
        sums = features.transpose(-1, -2) @ state
        factor, lse = normalise(sums[..., -1], centring.total, offset, config.eps)
        # Without keys the answer is 0 even for a query of NaN.
        out = torch.where((centring.total == 0).unsqueeze(-1), 0, sums[..., :-1] * factor.unsqueeze(-1))
        outs.append(out.to(v.dtype))
        lses.append(lse)
    if not outs:
        return Partial(v.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3], dtype=wide))
    return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _sum_keys(k: Tensor, v: Tensor, terms: int, centring: Centring, keep: Tensor | None, chunk: int) -> Tensor:
    """Sum each feature of the keys with the values beside it and a last column of ones, ``[B, H, R, Dv + 1]``."""
    features = taylor_feature_count(k.shape[-1], terms)
    state = torch.zeros(*k.shape[:2], features, v.shape[-1] + 1, dtype=centring.weights.dtype, device=k.device)
    for start in range(0, k.shape[2], chunk):
        some = slice(start, start + chunk)
        key = k[:, :, some].to(state.dtype) - centring.key_mean
        value = v[:, :, some].to(state.dtype)
        if keep is not None:
            # A masked token may hold NaN, which a weight of 0 would not remove.
            drop = ~keep[..., some, None]
            key, value = key.masked_fill(drop, 0), value.masked_fill(drop, 0)
        extended = torch.cat([value, torch.ones_like(key[..., :1])], dim=-1) * centring.weights[..., some, None]
        state = state + monomials(with_constant(key.transpose(-1, -2)), terms - 1) @ extended
    return state
