import pytest
import torch
from attn_kernels import TaylorConfig, taylor_attention
from attn_kernels.taylor import plan as plans
from attn_kernels.testing import assert_close, error_ratio, make_qkv

SMALL = {"key_chunk": 16, "feature_chunk": 20, "value_chunk": 4}


def compare(tensors, terms, ratio, *, scale=0.4, mask=None, **settings):
    config = TaylorConfig(**settings)
    expected, actual = (
        taylor_attention(*tensors, terms=terms, scale=scale, key_mask=mask, config=config, impl=impl)
        for impl in ("reference", "blocked")
    )
    assert actual.out.dtype == expected.out.dtype
    assert actual.lse.dtype == expected.lse.dtype
    for name, one, two in zip(("out", "lse"), actual, expected, strict=True):
        assert torch.equal(one.isnan(), two.isnan()), name
        assert_close(name, one.nan_to_num(nan=0, neginf=-torch.inf), two.nan_to_num(nan=0, neginf=-torch.inf), ratio)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("coefficients", ["taylor", "hermite"])
@pytest.mark.parametrize("terms", range(1, 9))
def test_every_path_equals_the_reference(series, terms, coefficients, path):
    # Float64 tells a wrong weight from rounding, whatever the condition of the denominators.
    tensors, mask = series.make_case(width=4, dtype=torch.float64), series.make_mask()
    compare(tensors, terms, 1e-11, coefficients=coefficients, path=path)
    compare(tensors, terms, 1e-11, coefficients=coefficients, path=path, mask=mask, **SMALL)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 64), (130, 17), (17, 130), (0, 5)])
@pytest.mark.parametrize("terms", [3, 4])
def test_any_number_of_tokens(series, terms, queries, keys, path):
    tensors = series.make_case(queries, keys, 5, 3, dtype=torch.float64)
    if queries:
        compare(tensors, terms, 1e-11, path=path, key_chunk=16)
    else:
        part = taylor_attention(*tensors, terms=terms, config=TaylorConfig(path=path), impl="blocked")
        assert part.out.shape == (2, 3, 0, 3)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("terms", [3, 4, 5])
def test_low_precision_is_computed_in_float32(series, terms, dtype, ratio, path):
    q, k, v = series.make_case(dtype=dtype, std=0.7)
    part = taylor_attention(q, k, v, terms=terms, config=TaylorConfig(path=path), impl="blocked")
    out, lse, share = series.pairwise(q, k, v, terms)
    answered = share > 0.1
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out[answered], out[answered], ratio)
    assert_close("lse", part.lse[answered], lse[answered], 1e-5)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("terms", [3, 4])
def test_masked_tokens_may_hold_anything(series, terms, path):
    q, k, v = series.make_case()
    mask = series.make_mask()
    mask[1] = False
    dropped = ~mask[:, None, :, None]
    config = TaylorConfig(path=path, **SMALL)
    dirty = k.masked_fill(dropped, torch.nan), v.masked_fill(dropped, torch.inf)
    clean, other = (
        taylor_attention(q, *some, terms=terms, key_mask=mask, config=config, impl="blocked")
        for some in ((k, v), dirty)
    )
    assert torch.equal(clean.out, other.out)
    assert torch.equal(clean.lse, other.lse)
    assert not other.out[1].count_nonzero()
    assert torch.equal(other.lse[1], torch.full_like(other.lse[1], -torch.inf))
    gone = taylor_attention(q[:1], k[:1, :, mask[0]], v[:1, :, mask[0]], terms=terms, impl="reference")
    assert_close("as if the keys were not there", other.out[:1], gone.out, 1e-5)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("masked", [True, False])
def test_independent_blocks_equal_the_reference(series, masked, path):
    tensors = series.make_case(dtype=torch.float64)
    mask = series.make_mask() if masked else None
    compare(tensors, 4, 1e-11, path=path, mask=mask, blocks=3, mode="independent", key_chunk=16)


@pytest.mark.parametrize("path", ["full", "streaming"])
@pytest.mark.parametrize("terms", [3, 5])
def test_stored_sums_of_values_are_rounded_and_denominators_are_not(series, terms, path):
    q, k, v = series.make_case(std=0.8)
    parts = [
        taylor_attention(q, k, v, terms=terms, config=TaylorConfig(path=path, store=store, **SMALL), impl="blocked")
        for store in ("float32", "bfloat16")
    ]
    assert_close("lse", parts[1].lse, parts[0].lse, 1e-6)
    assert 1e-4 < error_ratio(parts[1].out, parts[0].out) < 1e-2


@pytest.mark.parametrize("terms", [3, 4])
def test_groups_of_heads_and_strides_change_nothing(series, monkeypatch, terms):
    q, k, v = make_qkv(2, 5, 40, 6, logit_std=1.0, dtype=torch.float64)
    whole = taylor_attention(q, k, v, terms=terms, impl="blocked")
    monkeypatch.setattr(plans, "_CPU_BUFFER_BYTES", 2 * 40 * plans.monomial_count(7, 2) * 8)
    grouped = taylor_attention(*(x.mT.contiguous().mT for x in (q, k, v)), terms=terms, impl="blocked")
    config = plans.make_plan(
        heads=5, tokens=40, width=6, value_width=6, terms=terms, itemsize=8, device="cpu", config=TaylorConfig()
    )
    assert config.heads == 2
    assert_close("out", grouped.out, whole.out, 1e-12)
    assert_close("lse", grouped.lse, whole.lse, 1e-12)


@pytest.mark.parametrize("path", ["full", "streaming"])
def test_values_without_columns_leave_the_normaliser(series, path):
    q, k, v = series.make_case()
    config = TaylorConfig(path=path)
    part = taylor_attention(q, k, v[..., :0], config=config, impl="blocked")
    assert part.out.shape == (2, 3, 37, 0)
    assert_close("lse", part.lse, taylor_attention(q, k, v, impl="reference").lse, 1e-6)


def test_many_features_stream_and_few_do_not():
    sizes = {"heads": 4, "tokens": 4096, "itemsize": 4, "device": "cpu"}
    few = plans.make_plan(width=16, value_width=16, terms=4, config=TaylorConfig(), **sizes)
    many = plans.make_plan(width=128, value_width=128, terms=4, config=TaylorConfig(), **sizes)
    assert not few.streaming
    assert many.streaming
    assert plans.make_plan(width=16, value_width=16, terms=4, config=TaylorConfig(path="streaming"), **sizes).streaming
    forced = plans.make_plan(width=128, value_width=128, terms=4, config=TaylorConfig(path="full"), **sizes)
    assert not forced.streaming


def test_a_gradient_is_refused_and_a_leaf_under_no_grad_is_not(series):
    q, k, v = series.make_case()
    q.requires_grad_()
    with pytest.raises(ValueError, match="gradient"):
        taylor_attention(q, k, v, impl="blocked")
    assert taylor_attention(q, k, v).out.requires_grad
    with torch.no_grad():
        assert not taylor_attention(q, k, v, impl="blocked").out.requires_grad
