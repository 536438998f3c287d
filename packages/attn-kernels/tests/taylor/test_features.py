import math
from itertools import combinations_with_replacement

import pytest
import torch
from attn_kernels.taylor.buffers import MonomialBuffer, gather_monomials
from attn_kernels.taylor.features import (
    constant_counts,
    feature_weights,
    monomial_count,
    monomials,
    split_weights,
    taylor_feature_count,
    unrank_multisets,
    with_constant,
)
from attn_kernels.testing import assert_close

SIZES = [(1, 1), (1, 4), (2, 3), (5, 2), (4, 4), (7, 3), (3, 7), (6, 5)]


def colexicographic(variables, degree):
    """All multisets, largest index first, sorted by it, then by the next."""
    return sorted(tuple(reversed(chosen)) for chosen in combinations_with_replacement(range(variables), degree))


def test_counts_are_those_of_the_series_and_not_of_one_degree_more():
    assert taylor_feature_count(32, 4) == 6545
    assert taylor_feature_count(16, 4) == 969
    assert math.comb(32 + 3, 4) == 52360
    assert math.comb(16 + 3, 4) == 3876
    for width in (1, 3, 16):
        for terms in range(1, 7):
            by_degree = sum(len(colexicographic(width, degree)) for degree in range(terms)) if width < 16 else None
            assert by_degree in (None, taylor_feature_count(width, terms))


@pytest.mark.parametrize(("width", "terms"), [(0, 3), (4, 0), (4, 9)])
def test_counts_outside_the_range_are_refused(width, terms):
    with pytest.raises(ValueError, match="must be"):
        taylor_feature_count(width, terms)


@pytest.mark.parametrize(("variables", "degree"), SIZES)
def test_unranking_enumerates_the_multisets_in_order(variables, degree):
    expected = colexicographic(variables, degree)
    assert len(expected) == monomial_count(variables, degree)
    ranks = torch.arange(len(expected))
    assert [tuple(row) for row in unrank_multisets(ranks, variables, degree).tolist()] == expected


def test_unranking_reaches_the_last_of_very_many():
    last = monomial_count(129, 7) - 1
    assert last > 1 << 36
    assert unrank_multisets(torch.tensor([0, last]), 129, 7).tolist() == [[0] * 7, [128] * 7]


def test_unranking_answers_for_any_shape_of_ranks():
    ranks = torch.arange(20).view(4, 5)
    assert torch.equal(unrank_multisets(ranks, 4, 3).view(20, 3), unrank_multisets(ranks.flatten(), 4, 3))


@pytest.mark.parametrize(("variables", "degree"), SIZES)
def test_monomials_are_the_products_of_their_indices(variables, degree):
    x = torch.randn(2, variables, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([x[:, list(chosen)].prod(dim=1) for chosen in colexicographic(variables, degree)], dim=1)
    assert_close("monomials", monomials(x, degree), expected, 1e-14)


@pytest.mark.parametrize("degree", range(6))
def test_a_buffer_holds_the_monomials(degree):
    x = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1
    buffer = MonomialBuffer(x.clone(), degree)
    buffer.fill()
    assert_close("rows", buffer.rows, monomials(x, degree), 1e-14)
    # Fewer heads and tokens live at the same place.
    part = buffer.narrow(1, 4)
    buffer.rows[:, 1:] = torch.nan if degree > 1 else buffer.rows[:, 1:]
    part.fill()
    assert_close("narrow", part.rows, monomials(x[:1, :, :4], degree), 1e-14)


@pytest.mark.parametrize("degree", range(2, 6))
def test_a_buffer_applies_factors_once_and_forgets_them(degree):
    x = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1
    factors = torch.rand(2, degree + 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    factors[:, :2] = 1
    constants = constant_counts(unrank_multisets(torch.arange(monomial_count(5, degree)), 5, degree))
    buffer = MonomialBuffer(x, degree)
    buffer.fill(factors)
    assert_close("factors", buffer.rows, monomials(x, degree) * factors[:, constants], 1e-14)
    buffer.fill()
    assert_close("without", buffer.rows, monomials(x, degree), 1e-14)


@pytest.mark.parametrize("degree", range(5))
def test_gathered_monomials_are_those_of_their_ranks(degree):
    x = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = monomials(x, degree)
    ranks = torch.arange(whole.shape[1])[1 % whole.shape[1] :: 2]
    out, scratch = (torch.full((2, len(ranks), 9), torch.nan, dtype=torch.float64) for _ in range(2))
    gather_monomials(x, unrank_multisets(ranks, 5, degree), out, scratch)
    assert_close("gathered", out, whole[:, ranks], 1e-14)


@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0])
@pytest.mark.parametrize("terms", range(1, 8))
def test_weighted_features_give_the_truncated_series(terms, scale):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    indices = unrank_multisets(torch.arange(taylor_feature_count(4, terms)), 5, terms - 1)
    weights = feature_weights(indices, scale, torch.float64)
    phi_q, phi_k = (monomials(with_constant(x), terms - 1) for x in (q, k))
    logits = scale * q.mT @ k
    series = sum(logits**power / math.factorial(power) for power in range(terms))
    assert_close("series", phi_q.mT @ (weights[:, None] * phi_k), series, 1e-13)


@pytest.mark.parametrize("terms", range(2, 7))
def test_features_split_in_two_have_the_same_weights(terms):
    rest = unrank_multisets(torch.arange(monomial_count(5, terms - 2)), 5, terms - 2)
    split = split_weights(rest, torch.arange(1, 5), -0.6, torch.float64)
    indices = unrank_multisets(torch.arange(monomial_count(5, terms - 1)), 5, terms - 1)
    whole_weights = feature_weights(indices, -0.6, torch.float64).tolist()
    weights = {tuple(chosen): weight for chosen, weight in zip(indices.tolist(), whole_weights, strict=True)}
    met = {}
    for row, factor in enumerate(range(1, 5)):
        for column, chosen in enumerate(rest.tolist()):
            if (weight := split[row, column].item()) != 0:
                whole = (factor, *chosen)
                assert whole not in met
                assert whole == tuple(sorted(whole, reverse=True))
                met[whole] = weight
    assert met.keys() | {(0,) * (terms - 1)} == weights.keys()
    assert all(math.isclose(met[chosen], weights[chosen], rel_tol=1e-12) for chosen in met)
