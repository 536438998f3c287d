"""Symmetric monomials: their order, number, weights and values.

A feature of ``exp``'s series with P terms is a monomial of degree 0 to P - 1 in the D coordinates of a token. With a
constant coordinate in front, ``x_0 = 1``, all of them are the monomials of degree exactly P - 1 in D + 1 variables,
one kind instead of P. They stand in colexicographic order, that is sorted by their largest index, then by the next
largest, and so on. Two facts make this order useful: the monomials of degree p whose largest index is i are ``x_i``
times a *prefix* of those of degree p - 1, so that they are computed from slices without an index table; and a rank is
turned into its indices by P - 1 searches, so that any range of features can be computed alone.

Monomials do not carry their weights: ``T_P(s q.k) = sum_r w_r phi_r(q) phi_r(k)``, and w is applied once to the sum
over the keys.
"""

import math

import torch
from torch import Tensor

from attn_kernels.taylor.config import check_terms


def taylor_feature_count(width: int, terms: int) -> int:
    """Number of symmetric features of a series with ``terms`` terms, ``C(width + terms - 1, terms - 1)``.

    6,545 for width 32 and 4 terms, 969 for width 16. The figures 52,360 and 3,876 that are sometimes quoted for these
    count the monomials of degree 4 alone, ``C(width + 3, 4)``, which a series with 4 terms does not contain.

    Args:
        width: D.
        terms: P, the highest degree plus one.

    Raises:
        ValueError: The width is not positive, or the number of terms is out of range.
    """
    check_terms(terms)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return math.comb(width + terms - 1, terms - 1)


def monomial_count(variables: int, degree: int) -> int:
    """Number of monomials of exactly ``degree`` in ``variables`` variables: the length of a prefix."""
    return math.comb(variables + degree - 1, degree) if variables > 0 else int(degree == 0)


def with_constant(x: Tensor) -> Tensor:
    """Put the constant coordinate in front: ``[..., D, N]`` to ``[..., D + 1, N]``."""
    return torch.cat([torch.ones_like(x[..., :1, :]), x], dim=-2)


def monomials(x: Tensor, degree: int) -> Tensor:
    """Compute all monomials of a degree, differentiably.

    Args:
        x: ``[..., V, N]``, V variables of N tokens.
        degree: Degree, 0 or more.

    Returns:
        ``[..., C(V + degree - 1, degree), N]`` in colexicographic order.
    """
    block = torch.ones_like(x[..., :1, :])
    for below in range(degree):
        rows = [x[..., i : i + 1, :] * block[..., : monomial_count(i + 1, below), :] for i in range(x.shape[-2])]
        block = torch.cat(rows, dim=-2)
    return block


def unrank_multisets(ranks: Tensor, variables: int, degree: int) -> Tensor:
    """Turn ranks in colexicographic order into the indices of monomials, on the device of the ranks.

    The combinatorial number system for multisets (Knuth, TAOCP 4A, 7.2.1.3): the largest index is the greatest i with
    ``C(i + degree - 1, degree) <= rank``; the remainder is a rank among those of one degree less.

    Args:
        ranks: ``[...]`` int64 in ``[0, C(variables + degree - 1, degree))``.
        variables: Number of variables.
        degree: Number of factors.

    Returns:
        ``[..., degree]`` int64, non-increasing, each in ``[0, variables)``.
    """
    first = torch.arange(variables, device=ranks.device)
    columns = []
    remainder = ranks.contiguous()
    for below in range(degree - 1, -1, -1):
        # table[i] = C(i + below, below + 1), the monomials of degree below + 1 whose largest index is less than i.
        table = torch.ones_like(first)
        for step in range(below + 1):
            table = table * (first + step) // (step + 1)
        largest = torch.searchsorted(table, remainder, right=True) - 1
        remainder = remainder - table[largest]
        columns.append(largest)
    return torch.stack(columns, dim=-1) if columns else ranks.new_zeros(*ranks.shape, 0)


def feature_weights(indices: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Weights w of features: ``scale^m / prod_i c_i!`` for a monomial of degree m in which ``x_i`` stands c_i times.

    The multinomial ``m! / prod c_i!`` times the coefficient ``scale^m / m!`` of the series. The constant coordinate,
    index 0, counts for neither.

    Args:
        indices: ``[..., P - 1]`` int64, non-increasing; 0 is the constant.
        scale: Score scale, of any sign.
        dtype: Dtype of the weights.

    Returns:
        ``[...]`` of ``dtype``.
    """
    weights = torch.ones(indices.shape[:-1], dtype=dtype, device=indices.device)
    run = torch.ones_like(weights)
    for position in range(indices.shape[-1]):
        index = indices[..., position]
        if position > 0:
            run = torch.where(index == indices[..., position - 1], run + 1, 1)
        weights = torch.where(index > 0, weights * scale / run, weights)
    return weights


def split_weights(indices: Tensor, factors: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Weights of monomials that get one more factor; 0 where the product is made from another monomial already.

    A feature is made once, as its largest factor times the rest, so a factor smaller than one of the rest's makes a
    duplicate.

    Args:
        indices: ``[F, P - 2]`` int64, non-increasing; the monomials.
        factors: ``[g]`` int64, indices of the further factors, none of them the constant.
        scale: Score scale.
        dtype: Dtype of the weights.

    Returns:
        ``[g, F]``.
    """
    weights = feature_weights(indices, scale, dtype) * scale
    if indices.shape[-1] == 0:
        return weights.expand(len(factors), -1)
    counts = torch.ones(len(factors), len(indices), dtype=dtype, device=indices.device)
    for position in range(indices.shape[-1]):
        counts += indices[:, position] == factors[:, None]
    return torch.where(indices[:, 0] <= factors[:, None], weights / counts, 0)


def constant_counts(indices: Tensor) -> Tensor:
    """How often the constant stands in each monomial: ``P - 1`` minus its degree; ``[..., P - 1]`` to ``[...]``."""
    return (indices == 0).sum(dim=-1)
