"""The truncated series evaluated pair by pair in float64: the independent oracle of Taylor attention."""

import math

import torch
from attn_kernels.testing import make_qkv


def pairwise(q, k, v, terms, *, scale=None, mask=None, centre=True, limit=None):
    """``out``, ``lse`` and the denominators' shares; ``limit`` = Hermite coefficients below this logit spread."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kept = torch.ones_like(k[..., :1]) if mask is None else mask[:, None, :, None].double()
    k, v = (torch.where(kept > 0, x, 0) for x in (k, v))
    lost = torch.zeros_like(q[..., :1])
    weights = kept.mT
    if centre:
        mean_q = q.mean(dim=2, keepdim=True)
        weights = weights * torch.exp(scale * mean_q @ k.mT)
        mean_k = weights @ k / weights.sum(dim=-1, keepdim=True)
        q, k = q - mean_q, k - mean_k
        lost = scale * q @ mean_k.mT
    logits = scale * q @ k.mT
    series = sum(logits**power / math.factorial(power) for power in range(terms))
    if limit is not None:
        variance = (weights * logits**2).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
        std = variance.sqrt()
        # The Hermite expansion itself: exp(s^2 / 2) sum_n s^n / n! He_n(r / s).
        hermite, before = torch.ones_like(logits), torch.zeros_like(logits)
        fitted = torch.zeros_like(logits)
        for order in range(terms):
            fitted = fitted + std**order / math.factorial(order) * hermite
            hermite, before = logits / std * hermite - order * before, hermite
        series = torch.where(std < limit, torch.exp(variance / 2) * fitted, series)
    series = series * weights
    total = series.sum(dim=-1, keepdim=True)
    return series @ v / total, (total.log() + lost)[..., 0], total[..., 0] / weights.sum(dim=-1)


def with_means(q, k, strength=0.5, seed=5):
    """Add a common direction to all queries of a head, and another to all keys."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(2, *q.shape[:2], 1, q.shape[-1], generator=generator) * strength
    return q + shift[0].to(q), k + shift[1].to(k)


def make_case(queries=37, keys=53, width=6, value_width=9, std=1.0, dtype=torch.float32, seed=0):
    """Cross attention of two rows and three heads whose queries and keys have means."""
    q, k, v = make_qkv(
        2, 3, queries, width, kv_tokens=keys, value_width=value_width, logit_std=std, seed=seed, dtype=torch.float32
    )
    q, k = with_means(q, k)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def make_mask(keys=53, seed=3):
    """Two rows of a key mask, about half kept."""
    return torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) > 0.5
