from itertools import pairwise

import pytest
import torch
from attn_kernels import TaylorConfig, fidelity, merge_partials, softmax_attention, taylor_attention
from attn_kernels.testing import assert_close, make_qkv


def reference(q, k, v, terms, **settings):
    scale, mask = settings.pop("scale", None), settings.pop("mask", None)
    config = TaylorConfig(**settings)
    return taylor_attention(q, k, v, terms=terms, scale=scale, key_mask=mask, config=config, impl="reference")


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("terms", range(1, 9))
def test_equals_the_series_pair_by_pair(series, terms, masked, centre):
    q, k, v = series.make_case()
    mask = series.make_mask() if masked else None
    part = reference(q, k, v, terms, mask=mask, centre=centre)
    out, lse, share = series.pairwise(q, k, v, terms, mask=mask, centre=centre)
    assert torch.equal(part.lse.isnan(), share <= 1e-6)
    # Where positive and negative terms almost cancel, float32 loses as many digits as they do.
    answered = share > 0.1
    assert answered.double().mean() > 0.9
    assert_close("out", part.out[answered], out[answered], 1e-5)
    assert_close("lse", part.lse[answered], lse[answered], 1e-5)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-13), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_sums_are_as_wide_as_float32_for_every_dtype(series, dtype, ratio):
    q, k, v = series.make_case(dtype=dtype)
    part = reference(q, k, v, 3)
    out, lse, _ = series.pairwise(q, k, v, 3)
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, 1e-6)


def test_many_keys_of_low_precision_do_not_stall_the_sums():
    # Sums in bfloat16 would stop growing at a few hundred keys: the answer is the mean of v, 0.5.
    v = torch.arange(6000).remainder(2).view(1, 1, -1, 1).bfloat16()
    q, k = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 6000, 8, dtype=torch.bfloat16)
    assert_close("mean", reference(q, k, v, 3).out, torch.full((1, 1, 4, 1), 0.5), 1e-6)


def test_many_terms_and_small_logits_are_softmax(series):
    q, k, v = series.make_case(std=0.2)
    exact = softmax_attention(q, k, v)
    part, plain = (reference(q, k, v, 8, centre=centre) for centre in (True, False))
    assert_close("out", part.out, exact.out, 1e-5)
    assert_close("lse", part.lse, exact.lse, 1e-6)
    assert_close("not centred", plain.out, exact.out, 1e-2)
    q, k, v = make_qkv(2, 3, 37, 6, logit_std=0.2)
    plain, exact = reference(q, k, v, 8, centre=False), softmax_attention(q, k, v)
    assert_close("no means", plain.out, exact.out, 1e-5)
    assert_close("lse without means", plain.lse, exact.lse, 1e-6)


def test_the_error_falls_with_the_terms(series):
    q, k, v = series.make_case(std=1.0)
    exact = softmax_attention(q, k, v).out
    errors = [fidelity(reference(q, k, v, terms).out, exact).relative_l2 for terms in (1, 2, 3, 5, 7)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.1 * errors[1]


def test_centring_is_most_of_the_accuracy_where_queries_and_keys_have_means(series):
    # Half of the energy of q and k is a common mean, as in the heads of a model; logits of a row have std 1.
    q, k, v = make_qkv(1, 2, 300, 16, logit_std=1.0, seed=1)
    q, k = series.with_means(q, k, 1.0)
    q = q / (q @ k.mT / 16**0.5).std(dim=-1).mean()
    exact = softmax_attention(q, k, v).out
    for terms, largest in ((3, 0.3), (5, 0.08)):
        centred, plain = (
            fidelity(reference(q, k, v, terms, centre=centre).out, exact).relative_l2 for centre in (True, False)
        )
        assert centred < largest
        assert centred < 0.5 * plain


def test_shifting_all_keys_and_queries_changes_nothing_when_centred(series):
    q, k, v = series.make_case(std=1.5, dtype=torch.float64)
    part = reference(q, k, v, 3)
    shift = torch.randn(2, 1, 3, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    moved = reference(q, k + shift[0], v, 3)
    assert_close("keys", moved.out, part.out, 1e-12)
    # The logits themselves move by scale * q . shift, and the lse with them.
    assert_close("lse", moved.lse, part.lse + (q * shift[0]).sum(-1) * 6**-0.5, 1e-12)
    plain = reference(q, k + shift[0], v, 3, centre=False)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("not centred", plain.out, reference(q, k, v, 3, centre=False).out, 1e-2)


@pytest.mark.parametrize("terms", range(1, 8))
def test_hermite_coefficients_equal_the_expansion_pair_by_pair(series, terms):
    q, k, v = series.make_case(std=1.0, dtype=torch.float64)
    part = reference(q, k, v, terms, coefficients="hermite")
    out, lse, share = series.pairwise(q, k, v, terms, limit=1.2)
    answered = ~part.lse.isnan()
    assert answered.double().mean() > 0.9
    assert (share[answered] > 0).min()
    assert_close("out", part.out[answered], out[answered], 1e-10)
    assert_close("lse", part.lse[answered], lse[answered], 1e-10)


@pytest.mark.parametrize("terms", [3, 4, 5])
def test_hermite_is_better_below_the_limit_and_taylor_above(series, terms):
    q, k, v = make_qkv(1, 2, 300, 16, logit_std=0.8)
    exact = softmax_attention(q, k, v).out
    taylor, hermite = (
        fidelity(reference(q, k, v, terms, coefficients=name).out, exact).relative_l2 for name in ("taylor", "hermite")
    )
    assert hermite < 0.8 * taylor
    # The limit is that of each query: flat and steep queries in one call get their own coefficients.
    q = torch.cat([q, 8 * q], dim=2)
    mixed, plain = (reference(q, k, v, terms, coefficients=name) for name in ("hermite", "taylor"))
    steep = series.pairwise(q, k, v, terms, limit=1.2)[1].isnan()[:, :, 300:]
    assert torch.equal(plain.lse.isnan()[:, :, 300:], steep)
    assert_close("steep queries", mixed.out[:, :, 300:][~steep], plain.out[:, :, 300:][~steep], 1e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("flat queries", mixed.out[:, :, :300], plain.out[:, :, :300], 1e-2)


@pytest.mark.parametrize("terms", [3, 5, 7])
def test_odd_series_answer_every_query(series, terms):
    q, k, v = series.make_case(std=6.0)
    part = reference(q, k, v, terms)
    assert part.lse.isfinite().min()
    # A mean with positive weights stays within the values.
    assert (part.out.amax(dim=2) <= v.amax(dim=2) + 1e-5).min()
    assert (part.out.amin(dim=2) >= v.amin(dim=2) - 1e-5).min()


def test_a_query_without_a_positive_denominator_gets_nan_and_nothing_else():
    k = torch.tensor([2.5, 2.5, 2.5, -7.5]).view(1, 1, 4, 1)
    q = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    v = torch.ones(1, 1, 4, 2)
    # Without centring T_2(-2.5) = -1.5 for three keys and T_2(7.5) = 8.5 for one; the other query has 3 * 3.5 - 6.5.
    part = reference(q, k, v, 2, scale=1.0, centre=False)
    assert_close("positive", part.lse.exp(), torch.tensor([[[4.0, 4.0]]]), 1e-6)
    part = reference(1.5 * q, k, v, 2, scale=1.0, centre=False, eps=0.99)
    assert part.out.isfinite().min()
    part = reference(q, k[:, :, :3], v[:, :, :3], 2, scale=1.0, centre=False)
    assert_close("fine", part.out[:, :, 0], torch.ones(1, 1, 2), 1e-6)
    assert part.out[:, :, 1].isnan().min()
    assert torch.equal(part.lse.isnan(), torch.tensor([[[False, True]]]))
    merged = merge_partials(part, softmax_attention(q, k, v, scale=1.0))
    assert torch.equal(merged.out.isnan().amax(dim=-1), torch.tensor([[[False, True]]]))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_an_infinite_denominator_is_no_answer(impl):
    # The denominator overflows and the sums of the small values do not: their ratio would be a finite 0.
    q, k, v = torch.full((1, 1, 2, 1), 1e2), torch.full((1, 1, 3, 1), 1e18), torch.full((1, 1, 3, 2), 1e-10)
    part = taylor_attention(q, k, v, scale=1.0, config=TaylorConfig(centre=False), impl=impl)
    assert part.out.isnan().min()
    assert part.lse.isnan().min()


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_without_keys_even_a_query_of_nan_gets_zeros(series, impl):
    q, k, v = series.make_case()
    q[0, 0, 0] = torch.nan
    mask = torch.zeros(2, 53, dtype=torch.bool)
    part = taylor_attention(q, k, v, key_mask=mask, impl=impl)
    assert not part.out.count_nonzero()
    assert torch.equal(part.lse, torch.full_like(part.lse, -torch.inf))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_not_a_number_spreads_to_everything_it_enters_and_no_further(series, impl):
    q, k, v = series.make_case()
    bad = k.clone()
    bad[0, 1, 7, 2] = torch.nan
    part = taylor_attention(q, bad, v, impl=impl)
    assert part.out[0, 1].isnan().min()
    assert part.out[1].isfinite().min()
    assert part.out[0, 0].isfinite().min()
    bad = v.clone()
    bad[0, 1, 7, 2] = torch.nan
    part = taylor_attention(q, k, bad, impl=impl)
    assert part.out[0, 1, :, 2].isnan().min()
    assert part.out.isnan().sum() == q.shape[2]


def test_merging_a_partition_of_the_keys_is_right_for_exact_and_series_parts(series):
    # Where the series is exact, every mix of exact and series parts is the softmax over all keys.
    q, k, v = series.make_case(std=0.2)
    exact = softmax_attention(q, k, v)
    for first in (softmax_attention, lambda *some: reference(*some, 8)):
        parts = merge_partials(first(q, k[:, :, :20], v[:, :, :20]), reference(q, k[:, :, 20:], v[:, :, 20:], 8))
        assert_close("out", parts.out, exact.out, 1e-5)
        assert_close("lse", parts.lse, exact.lse, 1e-6)


def test_blocks_are_as_many_heads(series):
    q, k, v = series.make_case(width=6, value_width=9)
    part = reference(q, k, v, 3, scale=0.4, blocks=3, mode="independent")
    for block in range(3):
        some = slice(2 * block, 2 * block + 2)
        alone = reference(q[..., some], k[..., some], v[..., 3 * block : 3 * block + 3], 3, scale=0.4)
        assert_close("block", part.out[..., 3 * block : 3 * block + 3], alone.out, 1e-6)
    assert part.lse.isnan().min()
    # It is another function: even its exact form is not the head's attention.
    whole = reference(q, k, v, 3, scale=0.4)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("whole", part.out, whole.out, 0.1)


@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
def test_gradients_are_those_of_finite_differences(series, coefficients):
    q, k, v = (x[:1, :1].requires_grad_() for x in series.make_case(5, 6, 3, 2, dtype=torch.float64))
    mask = torch.tensor([[True, True, False, True, True, True]])

    def both(*tensors):
        return tuple(reference(*tensors, 3, mask=mask, coefficients=coefficients, hermite_limit=5.0))

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_few_features_at_a_time_change_nothing(series, monkeypatch):
    q, k, v = series.make_case()
    part = reference(q, k, v, 4)
    monkeypatch.setattr("attn_kernels.taylor.reference._FEATURES_AT_ONCE", 500)
    chunked = reference(q, k, v, 4)
    assert_close("out", chunked.out, part.out, 1e-5)
    assert_close("lse", chunked.lse, part.lse, 1e-6)
