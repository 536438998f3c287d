import math

import pytest
import torch
from attn_kernels import TokenGrid, relative_l2, softmax_attention
from attn_kernels.hybrid import Projection, fit_projection, hybrid_attention
from attn_kernels.testing import assert_close, make_qkv

GRID = TokenGrid(5, 12, 13)
LENGTH = 164


def inputs(dtype=torch.float32, width=24, values=10, std=1.0):
    return make_qkv(2, 2, LENGTH, width, value_width=values, dtype=dtype, logit_std=std, smooth_grid=GRID)


def near_pairs(places):
    """Which pairs are near, by the definition: one loop per pair."""
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for i in range(LENGTH):
        for j in range(LENGTH):
            if "window" in places:
                seen[i, j] = abs(i - j) <= places["window"] or j < places.get("prefix", 0)
                continue
            inside = [GRID.start <= n < GRID.stop for n in (i, j)]
            if not inside[0]:
                seen[i, j] = places.get("exact_queries", "exact") == "exact" or not inside[1]
            elif not inside[1]:
                seen[i, j] = True
            else:
                (r, c), (s, d) = (divmod(n - GRID.start, GRID.columns) for n in (i, j))
                seen[i, j] = max(abs(r - s), abs(c - d)) <= places["radius"]
    return seen


def oracle(q, k, v, projection, near, *, terms=3, weight=1.0, mask=None, centre=True):
    """Weigh every pair in float64: the softmax weight near by, what the series says elsewhere."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    keep = torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool) if mask is None else mask[:, None, None]
    k, v = (x.masked_fill(~keep.mT, 0) for x in (k, v))
    if centre:
        a = q.mean(2, keepdim=True)
        shares = (scale * a @ k.mT).exp() * keep
        b = (shares / shares.sum(-1, keepdim=True)) @ k
    else:
        a = b = torch.zeros_like(q[:, :, :1])
    residual = scale * ((q - a) @ projection.q_basis.double()) @ ((k - b) @ projection.k_basis.double()).mT
    series = sum(residual**degree / math.factorial(degree) for degree in range(terms))
    exact_part = scale * ((q - a) @ b.mT + a @ k.mT)
    far = weight * exact_part.exp() * series
    weights = torch.where(near, (scale * q @ k.mT).exp(), far) * keep
    total = weights.sum(-1)
    return weights @ v / total.unsqueeze(-1), total.log()


PLACES = [
    {"window": 9},
    {"window": 9, "prefix": 20},
    {"window": 0},
    {"grids": [GRID], "radius": 2},
    {"grids": [GRID], "radius": 1, "exact_queries": "local"},
]


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_equals_the_pairwise_form(places, masked, impl):
    q, k, v = inputs()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    projection = fit_projection(q, k, rank=6, key_mask=mask)
    out, lse = oracle(q, k, v, projection, near_pairs(places), mask=mask)
    if masked:
        # Masked tokens may hold anything.
        k[0, :, ~mask[0]], v[1, :, ~mask[1]] = torch.nan, torch.inf
    part = hybrid_attention(q, k, v, projection, **places, key_mask=mask, impl=impl)
    assert_close("out", part.out, out, 1e-5)
    assert_close("lse", part.lse, lse, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("terms", "weight", "centre"), [(1, 1.0, True), (5, 0.5, True), (3, 1.0, False), (3, 0.0, True)]
)
def test_settings(terms, weight, centre, impl):
    q, k, v = inputs()
    projection = fit_projection(q, k, rank=5)
    near = near_pairs({"window": 9})
    out, lse = oracle(q, k, v, projection, near, terms=terms, weight=weight, centre=centre)
    part = hybrid_attention(q, k, v, projection, window=9, terms=terms, weight=weight, centre=centre, impl=impl)
    assert_close("out", part.out, out, 1e-5)
    assert_close("lse", part.lse, lse, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, ratio, impl):
    q, k, v = inputs(dtype)
    projection = fit_projection(q, k, rank=6)
    out, lse = oracle(q, k, v, projection, near_pairs(PLACES[3]))
    part = hybrid_attention(q, k, v, projection, **PLACES[3], impl=impl)
    assert part.out.dtype == dtype
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, max(ratio / 10, 1e-12))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("places", [{"window": 200}, {"grids": [GRID], "radius": 13}], ids=str)
def test_a_window_over_all_keys_is_exact(places, impl):
    q, k, v = inputs(std=2.0)
    projection = fit_projection(q, k, rank=6)
    exact = softmax_attention(q, k, v)
    part = hybrid_attention(q, k, v, projection, **places, impl=impl)
    assert_close("out", part.out, exact.out, 1e-5)
    assert_close("lse", part.lse, exact.lse, 1e-5)


def test_cross_attention():
    q, k, v = make_qkv(2, 2, 40, 16, kv_tokens=90, logit_std=1.0)
    projection = fit_projection(q, k, rank=8)
    pairs = [hybrid_attention(q, k, v, projection, window=7, prefix=3, impl=i) for i in ("blocked", "reference")]
    assert_close("out", pairs[0].out, pairs[1].out, 1e-5)
    assert_close("lse", pairs[0].lse, pairs[1].lse, 1e-5)


@pytest.mark.parametrize(("std", "times"), [(0.5, 15.0), (1.0, 6.0), (2.0, 2.5)])
def test_one_denominator_is_several_times_closer_than_a_sum_or_the_window_alone(std, times):
    grid = TokenGrid(0, 24, 24)
    q, k, v = make_qkv(1, 2, 576, 64, logit_std=std, smooth_grid=grid)
    exact = softmax_attention(q, k, v).out
    projection = fit_projection(q, k, rank=16)
    places = {"grids": [grid], "radius": 3}

    def error(**settings):
        return float(relative_l2(hybrid_attention(q, k, v, projection, **places, **settings).out, exact))

    shared = error()
    local = error(weight=0.0)
    # The best of the weights a user may try, with the same series.
    additive = min(error(combine="additive", weight=weight) for weight in (0.05, 0.1, 0.2, 0.5, 1.0))
    assert shared < local / times, (shared, local, additive)
    assert shared < additive / times, (shared, local, additive)
    assert error(terms=5) < shared


def test_low_vectors_of_ones_own():
    q, k, v = inputs()
    projection = fit_projection(q, k, rank=6)
    expected = hybrid_attention(q, k, v, projection, window=9)
    part = hybrid_attention(q, k, v, low=projection.apply(q, k), window=9)
    assert_close("out", part.out, expected.out, 1e-6)
    q_low, k_low = projection.apply(q, k)
    part = hybrid_attention(q, k, v, low=(2 * q_low, k_low), low_scale=0.5 * 24**-0.5, window=9)
    assert_close("scaled", part.out, expected.out, 1e-6)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_the_additive_form_is_a_sum(impl):
    from attn_kernels import taylor_attention, window_attention

    q, k, v = inputs()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.3
    projection = fit_projection(q, k, rank=6)
    part = hybrid_attention(
        q, k, v, projection, window=9, prefix=5, weight=0.3, combine="additive", key_mask=mask, impl=impl
    )
    q_low, k_low = projection.apply(q, k)
    local = window_attention(q, k, v, window=9, prefix=5, key_mask=mask, impl="reference")
    beyond = taylor_attention(q_low, k_low, v, terms=3, scale=24**-0.5, key_mask=mask, impl="reference")
    assert_close("out", part.out, local.out + 0.3 * beyond.out, 1e-5)
    assert_close("lse", part.lse, local.lse, 1e-6)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_rows_without_keys_and_non_finite_input(impl):
    q, k, v = inputs()
    projection = fit_projection(q, k, rank=6)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0] = False
    part = hybrid_attention(q, k, v, projection, window=4, key_mask=mask, impl=impl)
    assert (part.out[0] == 0).all()
    assert (part.lse[0] == -torch.inf).all()
    assert part.out[1].isfinite().all()
    # Nothing near, and the far part off: a query without keys.
    mask[1, :20] = False
    part = hybrid_attention(q, k, v, projection, window=4, weight=0.0, key_mask=mask, impl=impl)
    assert (part.out[1, :, :16] == 0).all()
    assert (part.lse[1, :, :16] == -torch.inf).all()
    k[1, 0, 50, 0] = torch.nan
    part = hybrid_attention(q, k, v, projection, window=4, impl=impl)
    assert part.out[1, 0].isnan().all()
    assert part.out[1, 1].isfinite().all()


def test_a_negative_denominator_is_nan_and_never_a_number():
    q, k, v = make_qkv(1, 1, 60, 8, logit_std=6.0)
    projection = fit_projection(q, k, rank=8)
    for impl in ("reference", "blocked"):
        part = hybrid_attention(q, k, v, projection, window=0, terms=2, weight=50.0, centre=False, impl=impl)
        bad = part.lse.isnan()
        assert bad.any()
        assert part.out[bad].isnan().all()
        assert part.out[~bad].isfinite().all()


def test_gradients():
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 1, 7, 4, value_width=3))
    with torch.no_grad():
        projection = fit_projection(q, k, rank=2)

    def run(*x):
        return hybrid_attention(*x, projection, window=1, key_mask=torch.arange(7)[None] != 3)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_wrong_arguments_are_named():
    q, k, v = inputs()
    projection = fit_projection(q, k, rank=6)
    for settings, message in [
        ({}, "give window"),
        ({"window": 3, "radius": 3}, "give window"),
        ({"window": 3, "grids": [GRID]}, "grids and exact_queries"),
        ({"radius": 3, "grids": [GRID], "prefix": 2}, "prefix and chunk"),
        ({"window": 3, "weight": -1.0}, "weight"),
        ({"window": 3, "combine": "blend"}, "combine"),
        ({"window": 3, "terms": 9}, "terms"),
        ({"window": 3, "impl": "chosen"}, "impl must be one of"),
        ({"window": 3, "low": (q, k)}, "not both"),
    ]:
        with pytest.raises(ValueError, match=message):
            hybrid_attention(q, k, v, projection, **settings)
    with pytest.raises(ValueError, match="k_low must be"):
        hybrid_attention(q, k, v, low=(q, k[..., :3]), window=3)
    with pytest.raises(ValueError, match="3 heads of width 24"):
        hybrid_attention(q, k, v, Projection(*(torch.zeros(3, 24, 2) for _ in range(2)), torch.zeros(3)), window=3)
