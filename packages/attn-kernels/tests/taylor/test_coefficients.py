import math

import pytest
import torch
from attn_kernels.taylor.coefficients import hermite_factors, logit_variance
from attn_kernels.testing import assert_close


def least_squares(std, terms):
    """Coefficients nearest to exp under a Gaussian, solved on a fine grid."""
    r = torch.linspace(-9, 9, 20001, dtype=torch.float64) * std
    root = torch.exp(-((r / std) ** 2) / 4)
    powers = torch.stack([r**power for power in range(terms)], dim=-1)
    return torch.linalg.lstsq(powers * root[:, None], (r.exp() * root)[:, None]).solution[:, 0]


@pytest.mark.parametrize("std", [0.3, 0.8, 1.15])
@pytest.mark.parametrize("terms", range(1, 9))
def test_coefficients_are_the_least_squares_fit(terms, std):
    variance = torch.tensor([std * std], dtype=torch.float64)
    factors, log_gain = hermite_factors(variance, terms, 1.2)
    assert factors.shape == (terms, 1)
    ours = torch.stack([factors[terms - 1 - p, 0] / math.factorial(p) for p in range(terms)]) * log_gain.exp()
    assert_close("coefficients", ours, least_squares(std, terms), 1e-8)


def test_from_the_limit_on_and_without_spread_they_are_taylors():
    factors, log_gain = hermite_factors(torch.tensor([0.0, 1.2**2, 4.0, torch.nan]), 7, 1.2)
    assert torch.equal(factors, torch.ones(7, 4))
    assert torch.equal(log_gain, torch.zeros(4))


def test_the_variance_is_that_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 5, dtype=torch.float64, generator=generator) for n in (7, 40))
    k = k - k.mean(dim=1, keepdim=True)
    expected = (-0.3 * q @ k.mT).var(dim=-1, correction=0)
    covariance = k.mT @ k / 40
    assert_close("variance", logit_variance(q.mT, covariance, -0.3), expected, 1e-12)
