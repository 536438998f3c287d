"""Window attention: limits, all implementations alike, gradients, what may not happen."""

import pytest
import torch
from attn_kernels import TokenGrid, merge_partials, softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.window import blocked, window_attention, window_attention_2d, window_mask, window_mask_2d

GRIDS = (TokenGrid(5, 9, 13), TokenGrid(124, 5, 4))
LENGTH = 147


def oracle(q, k, v, seen, key_mask=None, scale=None):
    """Softmax over a bias of 0 and -inf, in float64."""
    kept = seen if key_mask is None else seen & key_mask[:, None, None]
    bias = torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, -torch.inf)
    return softmax_attention(q.double(), k.double(), v.double(), scale=scale, attn_bias=bias)


def mask_for(batch, keys, seed=1):
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.7


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [(0, 0, 1), (3, 0, 1), (10, 7, 1), (4, 30, 16), (40, 1, 5)])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (150, 90), (70, 201)])
def test_1d_equals_softmax_over_a_bias(impl, masked, options, queries, keys):
    q, k, v = make_qkv(2, 3, queries, 24, kv_tokens=keys, value_width=20, logit_std=3.0)
    window, prefix, chunk = options
    key_mask = mask_for(2, keys) if masked else None
    part = window_attention(q, k, v, window=window, prefix=prefix, chunk=chunk, key_mask=key_mask, impl=impl)
    expected = oracle(q, k, v, window_mask(queries, keys, window=window, prefix=prefix, chunk=chunk), key_mask)
    assert_close("out", part.out, expected.out, 1e-5)
    assert_close("lse", part.lse, expected.lse, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("radius", [0, 2, (1, 5), (20, 3)])
@pytest.mark.parametrize("exact_queries", ["exact", "local"])
def test_2d_equals_softmax_over_a_bias(impl, masked, radius, exact_queries):
    q, k, v = make_qkv(2, 3, LENGTH, 24, value_width=28, logit_std=3.0)
    key_mask = mask_for(2, LENGTH) if masked else None
    options = {"grids": GRIDS, "radius": radius, "exact_queries": exact_queries}
    part = window_attention_2d(q, k, v, key_mask=key_mask, impl=impl, **options)
    expected = oracle(q, k, v, window_mask_2d(LENGTH, **options), key_mask)
    assert_close("out", part.out, expected.out, 1e-5)
    assert_close("lse", part.lse, expected.lse, 1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_window_over_everything_is_exact_attention(impl):
    q, k, v = make_qkv(1, 2, 130, 16, logit_std=4.0)
    exact = softmax_attention(q, k, v)
    grid = TokenGrid(10, 12, 10)
    for part in (
        window_attention(q, k, v, window=130, impl=impl),
        window_attention(q, k, v, window=0, prefix=10**12, impl=impl),
        window_attention_2d(q, k, v, grids=[grid], radius=12, impl=impl),
    ):
        assert_close("out", part.out, exact.out, 1e-6)
        assert_close("lse", part.lse, exact.lse, 1e-6)


def test_window_and_the_rest_merge_to_exact_attention():
    q, k, v = make_qkv(2, 2, 80, 16, logit_std=3.0)
    seen = window_mask(80, 80, window=9, prefix=4)
    near = window_attention(q, k, v, window=9, prefix=4)
    far = softmax_attention(q, k, v, attn_bias=torch.zeros(80, 80).masked_fill(seen, -torch.inf))
    assert_close("out", merge_partials(near, far).out, softmax_attention(q, k, v).out, 1e-6)


def test_the_form_without_fused_attention_is_the_same(monkeypatch):
    q, k, v = make_qkv(2, 2, 150, 16, value_width=12, logit_std=3.0)
    key_mask = mask_for(2, 150)
    expected = window_attention(q, k, v, window=7, prefix=2, key_mask=key_mask, impl="reference")
    monkeypatch.setattr(blocked, "_has_flash", lambda queries: False)
    part = window_attention(q, k, v, window=7, prefix=2, key_mask=key_mask, impl="blocked")
    assert_close("out", part.out, expected.out, 1e-6)
    assert_close("lse", part.lse, expected.lse, 1e-6)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_query_without_keys_gets_zeros(impl):
    q, k, v = make_qkv(1, 2, 90, 8, kv_tokens=30)
    part = window_attention(q, k, v, window=4, impl=impl)
    assert (part.out[:, :, 34:] == 0).all()
    assert (part.lse[:, :, 34:] == -torch.inf).all()
    assert part.lse[:, :, :34].isfinite().all()
    part = window_attention(q, k, v, window=4, prefix=9, key_mask=torch.zeros(1, 30, dtype=torch.bool), impl=impl)
    assert (part.out == 0).all()
    assert (part.lse == -torch.inf).all()


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_masked_tokens_may_be_nan_and_seen_ones_may_not(impl):
    q, k, v = make_qkv(1, 2, LENGTH, 8)
    key_mask = mask_for(1, LENGTH)
    options = {"grids": GRIDS, "radius": 2, "key_mask": key_mask, "impl": impl}
    clean = window_attention_2d(q, k, v, **options)
    hole = ~key_mask[:, None, :, None]
    holed = window_attention_2d(q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.inf), **options)
    assert torch.equal(holed.out, clean.out)
    for poisoned in range(3):
        tensors = [q.clone(), k.clone(), v.clone()]
        token = int(key_mask[0, 20:].nonzero()[0]) + 20
        tensors[poisoned][0, 1, token, 3] = torch.nan
        out = window_attention_2d(*tensors, **options).out
        sees = window_mask_2d(LENGTH, grids=GRIDS, radius=2)[:, token] if poisoned else torch.arange(LENGTH) == token
        assert out[0, 1, sees].isnan().any(dim=-1).all()
        assert out[0, 0].isfinite().all()


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_is_computed_in_float32(dtype, ratio):
    q, k, v = make_qkv(1, 3, 100, 16, dtype=dtype, logit_std=3.0)
    expected = oracle(q, k, v, window_mask(100, 100, window=9, prefix=5))
    for impl in ("reference", "blocked"):
        part = window_attention(q, k, v, window=9, prefix=5, impl=impl)
        assert part.out.dtype == dtype
        assert part.lse.dtype == torch.float32
        assert_close(impl, part.out, expected.out, ratio)
        assert_close(impl, part.lse, expected.lse, 1e-5)


def test_float64_stays_float64():
    q, k, v = (x.double() for x in make_qkv(1, 2, 100, 16, logit_std=3.0))
    expected = oracle(q, k, v, window_mask(100, 100, window=9))
    for impl in ("reference", "blocked"):
        part = window_attention(q, k, v, window=9, impl=impl)
        assert part.lse.dtype == torch.float64
        assert_close(impl, part.out, expected.out, 1e-13)


def test_gradient_flows_through_the_reference_and_auto_takes_it():
    tensors = [x.double().requires_grad_() for x in make_qkv(1, 1, 12, 3, kv_tokens=9, value_width=2)]
    key_mask = mask_for(1, 9)

    def attend(q, k, v):
        part = window_attention(q, k, v, window=2, prefix=1, key_mask=key_mask)
        return part.out, part.lse.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(attend, tensors)
    with pytest.raises(ValueError, match="requires one; use the reference"):
        window_attention(*tensors, window=2, impl="blocked")


def test_sampled_queries_get_the_answers_of_all():
    q, k, v = make_qkv(1, 2, LENGTH, 16, logit_std=3.0)
    rows = torch.tensor([3, 60, 11, 146, 130])
    whole = window_attention_2d(q, k, v, grids=GRIDS, radius=2)
    some = window_attention_2d(q[:, :, rows], k, v, grids=GRIDS, radius=2, query_positions=rows)
    assert_close("2-D", some.out, whole.out[:, :, rows], 1e-6)
    whole = window_attention(q, k, v, window=6, prefix=3, chunk=10)
    some = window_attention(q[:, :, rows], k, v, window=6, prefix=3, chunk=10, query_positions=rows)
    assert_close("1-D", some.out, whole.out[:, :, rows], 1e-6)
    with pytest.raises(ValueError, match="query_positions names some"):
        window_attention(q[:, :, rows], k, v, window=6, query_positions=rows, impl="blocked")


def test_wrong_arguments_are_named():
    q, k, v = make_qkv(1, 2, 40, 8)
    with pytest.raises(ValueError, match="window >= 0"):
        window_attention(q, k, v, window=-3)
    with pytest.raises(ValueError, match="a query per key"):
        window_attention_2d(q[:, :, :30], k, v, grids=[TokenGrid(0, 5, 8)], radius=1)
    with pytest.raises(ValueError, match=r"int64 \[Nq\]"):
        window_attention(q, k, v, window=1, query_positions=torch.arange(39))
    with pytest.raises(ValueError, match="cannot run here"):
        window_attention(q.double(), k.double(), v.double(), window=1, impl="fused")


def test_runs_where_no_value_can_be_read():
    q, k, v = (torch.empty(2, 3, 60, 8, device="meta") for _ in range(3))
    key_mask = torch.empty(2, 60, dtype=torch.bool, device="meta")
    for impl in ("reference", "blocked"):
        one = window_attention(q, k, v, window=4, prefix=5, key_mask=key_mask, impl=impl)
        two = window_attention_2d(q, k, v, grids=[TokenGrid(3, 5, 7)], radius=2, key_mask=key_mask, impl=impl)
        assert one.out.shape == two.out.shape == (2, 3, 60, 8)
