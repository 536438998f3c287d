"""The far part of hybrid attention: what of the logits is exact, and the series of the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.partial import Partial
from attn_kernels.taylor.centring import centre
from attn_kernels.taylor.features import (
    feature_weights,
    monomials,
    taylor_feature_count,
    unrank_multisets,
    with_constant,
)


@dataclass(frozen=True, eq=False)
class FarField:
    """How hybrid attention sees a far key: ``exp(s_ij)`` as ``weight exp(offset_i) w_j T_P(low_scale q_i . k_j)``.

    With mean query a and mean key b the logits are ``(q_i - a) . b + a . k_j + (q_i - a) . (k_j - b)`` times the scale.
    The first part is ``offset_i``, the second the logarithm of ``w_j``; both are exact. The series gets the third,
    projected to few dimensions.

    Attributes:
        q_low: ``[B, H, Nq, r]``, projected queries minus their mean, times the scale.
        k_low: ``[B, H, Nk, r]``, projected keys minus their mean; 0 where masked.
        offset: ``[B, H, Nq]``.
        key_weights: ``[B, H, Nk]``, w times the weight of the far part; 0 where masked.
        keep: ``[B, 1, Nk]`` bool, unmasked keys, or ``None``.
        terms: P.
    """

    q_low: Tensor
    k_low: Tensor
    offset: Tensor
    key_weights: Tensor
    keep: Tensor | None
    terms: int

    def series(self, scores: Tensor) -> Tensor:
        """Evaluate ``T_P`` at low scores, of any shape."""
        total = torch.ones_like(scores)
        for degree in range(self.terms - 1, 0, -1):
            total = 1 + total * scores / degree
        return total

    def features(self, low: Tensor) -> Tensor:
        """Compute features ``[..., R, N]`` of projected tokens ``[..., N, r]``."""
        return monomials(with_constant(low.transpose(-1, -2)), self.terms - 1)

    def feature_weights(self) -> Tensor:
        """Return the weights ``[R, 1]`` by which features of queries and keys multiply to the series."""
        rank = self.q_low.shape[-1]
        ranks = torch.arange(taylor_feature_count(rank, self.terms), device=self.q_low.device)
        indices = unrank_multisets(ranks, rank + 1, self.terms - 1)
        return feature_weights(indices, 1.0, self.q_low.dtype).unsqueeze(-1)


@dataclass(frozen=True)
class FarSettings:
    """How the far part is computed.

    Attributes:
        scale: Score scale.
        low_scale: Scale of the projected scores.
        terms: P.
        weight: Factor of the far part.
        centred: Take means out; else the series gets all of the projected logits.
    """

    scale: float
    low_scale: float
    terms: int
    weight: float
    centred: bool


def far_field(
    q: Tensor, k: Tensor, low: tuple[Tensor, Tensor], settings: FarSettings, key_mask: Tensor | None
) -> FarField:
    """Prepare the far part.

    Args:
        q: ``[B, H, Nq, D]``.
        k: ``[B, H, Nk, D]``; masked keys may hold anything.
        low: Projected queries ``[B, H, Nq, r]`` and keys ``[B, H, Nk, r]``, in float32 or float64.
        settings: Scales, terms, weight and centring.
        key_mask: ``[B, Nk]`` bool or ``None``.
    """
    scale, centred = settings.scale, settings.centred
    keep = None if key_mask is None else key_mask[:, None]
    means = centre(q, k, scale=scale, keep=keep, enabled=centred)
    q_low, k_low = low
    if keep is not None:
        k_low = k_low.masked_fill(~keep.unsqueeze(-1), 0)
    if centred:
        q_low = q_low - q_low.mean(dim=2, keepdim=True)
        mean = means.weights.unsqueeze(-2) @ k_low / torch.where(means.total == 0, 1, means.total).unsqueeze(-1)
        k_low = k_low - mean
        if keep is not None:
            k_low = k_low.masked_fill(~keep.unsqueeze(-1), 0)
    wide = q_low.dtype
    # scale (q_i - a) . b without a centred copy of the queries.
    key_mean = means.key_mean.transpose(-1, -2)
    offset = scale * ((q.to(wide) @ key_mean) - means.query_mean @ key_mean).squeeze(-1) + means.shift
    weights = settings.weight * means.weights
    return FarField(settings.low_scale * q_low, k_low, offset, weights, keep, settings.terms)


def finish(numerator: Tensor, denominator: Tensor, peak: Tensor, dtype: torch.dtype) -> Partial:
    """Divide, and mark the queries that have no answer.

    Args:
        numerator: ``[B, H, n, Dv]``.
        denominator: ``[B, H, n]``; 0 without keys, not positive where a series with an even number of terms went
            astray.
        peak: ``[B, H, n]``, logarithm of the factor by which both were divided.
        dtype: Dtype of the output.

    Returns:
        ``Partial``: zeros and ``-inf`` without keys, NaN where the denominator is negative or not finite.
    """
    empty = denominator == 0
    valid = (denominator > 0) & (denominator < torch.inf)
    divisor = torch.where(valid, denominator, 1)
    out = torch.where(valid.unsqueeze(-1), numerator / divisor.unsqueeze(-1), torch.nan)
    lse = torch.where(valid, divisor.log() + peak, torch.nan)
    return Partial(torch.where(empty.unsqueeze(-1), 0, out).to(dtype), torch.where(empty, -torch.inf, lse))
