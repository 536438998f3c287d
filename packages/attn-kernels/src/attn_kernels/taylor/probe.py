"""Whether the truncated series keeps its denominators positive, asked before any value is read."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kernels.checks import check_key_mask, check_qkv
from attn_kernels.impl import Impl, resolve_impl
from attn_kernels.taylor.centring import Centring, centre, key_covariance
from attn_kernels.taylor.coefficients import hermite_factors, logit_variance
from attn_kernels.taylor.config import TaylorConfig, check_blocks, check_terms
from attn_kernels.triton_support import refuse_fused

_DEFAULT_CONFIG = TaylorConfig()
_SCORES_AT_ONCE = 1 << 22
"""Elements of scores that are held at a time."""


class DenominatorProbe(NamedTuple):
    """Denominators of some queries; device tensors, so that asking does not wait for the device.

    Attributes:
        minimum: ``[B, H]``, the smallest denominator as a share of the sum of the key weights: around 1 is sound, near
            0 is fragile, 0 or less has no answer. NaN where one is NaN, infinite where every key is masked.
        fraction_below: ``[B, H]``, share of the probed queries to which ``taylor_attention`` answers NaN.
    """

    minimum: Tensor
    fraction_below: Tensor


def denominator_probe(
    q: Tensor,
    k: Tensor,
    *,
    terms: int = 3,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: Tensor | None = None,
    config: TaylorConfig = _DEFAULT_CONFIG,
    impl: Impl | str = Impl.AUTO,
) -> DenominatorProbe:
    """Find the denominators that ``taylor_attention`` would divide by, for a sample of the queries and without values.

    The reference sums the series pair by pair, without features: that costs the exact scores of the sampled queries,
    whichever path runs afterwards, and is cheap for a sample of 64 to 256. The fused form sums the features of the
    keys, whose cost does not depend on the sample. An odd number of terms with Taylor's coefficients needs no probe.
    Without gradient.

    Args:
        q: ``[B, H, Nq, D]``, all queries: their mean enters the centring.
        k: ``[B, H, Nk, D]``.
        terms: P, as in ``taylor_attention``.
        scale: Score scale, as there.
        key_mask: ``[B, Nk]`` bool, True = keep.
        queries: ``[S]`` int64, positions of the sampled queries, the same in all heads; ``None`` = all, for which the
            reference takes as long as exact attention.
        config: Settings, as there; with ``blocks`` the probe is the worst of the blocks and their mean fraction.
        impl: ``"fused"``, ``"reference"``, or ``"auto"``: the first of these that can run.

    Returns:
        The probe.

    Raises:
        ValueError: Shapes, dtypes, devices, terms or ``queries`` do not fit, or ``impl`` cannot run here.
    """
    check_qkv(q, k, k[..., :0])
    check_key_mask(key_mask, k)
    check_terms(terms)
    scale = check_blocks(q, scale, config)
    if queries is not None and (queries.dtype is not torch.int64 or queries.ndim != 1 or len(queries) == 0):
        raise ValueError(f"queries must be int64 [S] with S > 0, got {queries.dtype} {tuple(queries.shape)}")
    if queries is not None and queries.device != q.device:
        raise ValueError(f"queries are on {queries.device}, q is on {q.device}")
    fused = refuse_fused(impl, q, k)
    if fused is None:
        from attn_kernels.taylor.fused import refuse_taylor_fused

        fused = refuse_taylor_fused(q, k, k, terms=terms, config=config)
    with torch.no_grad():
        if resolve_impl(impl, {Impl.FUSED: fused, Impl.REFERENCE: None}) is Impl.FUSED:
            from attn_kernels.taylor.fused import taylor_fused_denominators

            shares = taylor_fused_denominators(
                q, k, terms=terms, scale=scale, key_mask=key_mask, config=config, queries=queries
            )
        else:
            keep = None if key_mask is None else key_mask[:, None]
            width = q.shape[-1] // config.blocks
            blocks = [slice(start, start + width) for start in range(0, q.shape[-1], width)]
            parts = [_shares(q[..., some], k[..., some], terms, scale, keep, queries, config) for some in blocks]
            shares = torch.stack(parts, dim=2)
        answered = (shares > config.eps) & (shares < torch.inf)
        if key_mask is not None:
            empty = (key_mask.sum(dim=-1) == 0)[:, None, None, None]
            answered, shares = answered | empty, torch.where(empty, torch.inf, shares)
        return DenominatorProbe(shares.amin(dim=(2, 3)), 1 - answered.to(shares.dtype).mean(dim=(2, 3)))


def _shares(
    q: Tensor, k: Tensor, terms: int, scale: float, keep: Tensor | None, queries: Tensor | None, config: TaylorConfig
) -> Tensor:
    """Denominators over the sum of the key weights, ``[B, H, S]``; 0 where every key is masked."""
    centring = centre(q, k, scale=scale, keep=keep, enabled=config.centre)
    wide = centring.weights.dtype
    chosen = q if queries is None else q[:, :, queries]
    centred = (chosen.to(wide) - centring.query_mean).transpose(-1, -2)
    coefficients = [centred.new_ones(1) / math.factorial(power) for power in range(terms)]
    if config.coefficients == "hermite":
        variance = logit_variance(centred, key_covariance(k, centring, keep=keep), scale)
        factors, _ = hermite_factors(variance, terms, config.hermite_limit)
        coefficients = [c * factors[:, :, terms - 1 - power, :, None] for power, c in enumerate(coefficients)]
    denominator = _sum_series(centred, k, coefficients, scale, keep, centring)
    return denominator / torch.where(centring.total == 0, 1, centring.total)


def _sum_series(
    centred: Tensor, k: Tensor, coefficients: list[Tensor], scale: float, keep: Tensor | None, centring: Centring
) -> Tensor:
    """Weighted sums of the series over all keys for centred queries ``[B, H, D, S]``, ``[B, H, S]``."""
    total = torch.zeros_like(centred[:, :, 0])
    chunk = max(1, _SCORES_AT_ONCE // max(total.numel(), 1))
    for start in range(0, k.shape[2], chunk):
        some = slice(start, start + chunk)
        key = k[:, :, some].to(centred.dtype) - centring.key_mean
        if keep is not None:
            key = key.masked_fill(~keep[..., some, None], 0)
        logits = scale * (centred.transpose(-1, -2) @ key.transpose(-1, -2))
        series = torch.zeros_like(logits)
        for coefficient in reversed(coefficients):
            series = series * logits + coefficient
        total += (series @ centring.weights[:, :, some, None]).squeeze(-1)
    return total
