"""Coefficients of the series: those of Taylor, or the nearest polynomial to ``exp`` for a query's own logits.

For logits ``r ~ N(0, sigma^2)`` the polynomial of degree below P with the least squared distance from ``exp(r)`` is
the Hermite expansion ``exp(sigma^2 / 2) sum_{n<P} sigma^n / n! He_n(r / sigma)``. Sorted by powers of r, and with
``u = sigma^2 / 2``, the coefficient of ``r^p`` is ``exp(u) / p! * sum_{m <= (P-1-p)/2} (-u)^m / m!``: Taylor's, times
a gain common to all powers, times a factor that depends on ``P - 1 - p`` only. The two highest powers have factor 1.
"""

import torch
from torch import Tensor


def hermite_factors(variance: Tensor, terms: int, limit: float) -> tuple[Tensor, Tensor]:
    """Factors by which least-squares coefficients differ from those of Taylor.

    Args:
        variance: ``[..., N]``, variance of each query's logits.
        terms: P.
        limit: Standard deviation from which a query keeps Taylor's coefficients: factors 1, gain 1.

    Returns:
        ``[..., P, N]``, in row c the factor of power ``P - 1 - c``, that is of features in which the constant stands
        c times; and the logarithm of the gain, ``[..., N]``.
    """
    fitted = variance < limit * limit
    half = variance / 2
    rows = []
    total, term = torch.ones_like(half), torch.ones_like(half)
    for constants in range(terms):
        if constants > 0 and constants % 2 == 0:
            term = term * -half / (constants // 2)
            total = total + term
        rows.append(torch.where(fitted, total, 1))
    return torch.stack(rows, dim=-2), torch.where(fitted, half, 0)


def logit_variance(centred_q: Tensor, covariance: Tensor, scale: float) -> Tensor:
    """Variance of each query's logits, ``scale^2 q^T C q``.

    Args:
        centred_q: ``[..., D, N]``, queries minus their mean.
        covariance: ``[..., D, D]``, of the weighted keys.
        scale: Score scale.

    Returns:
        ``[..., N]``.
    """
    return scale * scale * (centred_q * (covariance @ centred_q)).sum(dim=-2)
