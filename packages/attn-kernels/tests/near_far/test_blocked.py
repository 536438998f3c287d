"""The blocked form equals the reference on everything."""

import pytest
import torch
from attn_kernels import NearFarConfig, NearFarCorrections, TokenGrid, near_far_attention, softmax_attention
from attn_kernels.near_far import blocked as module
from attn_kernels.testing import assert_close, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

RATIO = 1e-5


def assert_same(q, k, v, **options):
    with torch.no_grad():
        blocked = near_far_attention(q, k, v, impl="blocked", **options)
        expected = near_far_attention(q, k, v, impl="reference", **options)
    assert_close("out", blocked.out, expected.out, RATIO)
    assert_close("lse", blocked.lse, expected.lse, RATIO)
    assert blocked.out.dtype == expected.out.dtype
    assert blocked.lse.dtype == expected.lse.dtype
    return blocked


@st.composite
def cases(draw):
    grids, start = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        grids.append(TokenGrid(start, draw(st.integers(1, 9)), draw(st.integers(1, 9))))
        start = grids[-1].stop + draw(st.integers(0, 2))
    return {
        "grids": draw(st.permutations(grids)),
        "length": start + draw(st.integers(0, 5)),
        "config": NearFarConfig(
            tile=(draw(st.integers(1, 4)), draw(st.integers(1, 5))),
            radius=draw(st.integers(0, 3)),
            top_k=draw(st.integers(0, 5)),
            exact_queries=draw(st.sampled_from(["exact", "pooled"])),
        ),
        "widths": draw(st.sampled_from([(8, 8), (5, 9), (16, 3)])),
        "spread": draw(st.sampled_from([1.0, 4.0])),
        "kept": draw(st.sampled_from([None, 0.0, 0.1, 0.6, 1.0])),
        "corrected": draw(st.booleans()),
        "seed": draw(st.integers(0, 10_000)),
    }


def check(case):
    length, seed, (width, value_width) = case["length"], case["seed"], case["widths"]
    q, k, v = make_qkv(2, 3, length, width, value_width=value_width, logit_std=case["spread"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = None if case["kept"] is None else torch.rand(2, length, generator=generator) < case["kept"]
    corrections = None
    if case["corrected"]:
        corrections = NearFarCorrections(
            1 + 0.3 * torch.randn(3, generator=generator), torch.randn(3, generator=generator)
        )
    assert_same(q, k, v, grids=case["grids"], config=case["config"], key_mask=mask, corrections=corrections)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_equals_the_reference(case):
    check(case)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_the_reference_where_torch_has_no_fused_attention(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_has_flash", lambda queries: False)
        check(case)


@pytest.mark.parametrize("text", ["first", "last", "both", "none"])
def test_many_blocks_and_heads_are_put_together(text, monkeypatch):
    monkeypatch.setattr(module, "_CPU_GROUP_BYTES", 60_000)
    monkeypatch.setattr(module, "_CPU_BLOCK_BYTES", 60_000)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 700)
    start, end = {"first": (7, 0), "last": (0, 7), "both": (7, 3), "none": (0, 0)}[text]
    grid = TokenGrid(start, 13, 18)
    q, k, v = make_qkv(2, 3, grid.stop + end, 16, logit_std=3.0)
    for exact_queries in ("exact", "pooled"):
        assert_same(q, k, v, grids=[grid], config=NearFarConfig(4, 1, 2, exact_queries))


def test_text_longer_than_a_block_of_the_attention_kernel_may_be_masked_away():
    grid = TokenGrid(1100, 8, 8)
    q, k, v = make_qkv(1, 2, grid.stop, 16, logit_std=3.0)
    mask = torch.ones(1, grid.stop, dtype=torch.bool)
    mask[:, :1100] = False
    assert_same(q, k, v, grids=[grid], config=NearFarConfig(2, 0, 0, "pooled"), key_mask=mask)
    mask[:, 1100:] = False
    part = assert_same(q, k, v, grids=[grid], config=NearFarConfig(2, 0, 0), key_mask=mask)
    assert (part.out == 0).all()
    assert (part.lse == -torch.inf).all()


def test_a_scale_and_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(2, 3, 80, 16))
    packed = torch.cat([q, k, v], dim=-1)
    q, k, v = packed.chunk(3, dim=-1)
    assert_same(q, k, v, grids=[TokenGrid(8, 8, 9)], config=NearFarConfig(3, 1, 1), scale=0.4)


def test_float64_stays_float64():
    q, k, v = (x.double() for x in make_qkv(1, 2, 80, 16))
    config, grids = NearFarConfig(3, 1, 1), [TokenGrid(8, 8, 9)]
    part = near_far_attention(q, k, v, grids=grids, config=config, impl="blocked")
    expected = near_far_attention(q, k, v, grids=grids, config=config, impl="reference")
    assert_close("out", part.out, expected.out, 1e-13)
    assert part.lse.dtype == torch.float64


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_is_computed_in_float32(dtype, ratio):
    q, k, v = make_qkv(1, 3, 80, 16, dtype=dtype, logit_std=3.0)
    options = {"grids": [TokenGrid(8, 8, 9)], "config": NearFarConfig(3, 1, 1)}
    part = near_far_attention(q, k, v, impl="blocked", **options)
    expected = near_far_attention(q.float(), k.float(), v.float(), impl="reference", **options)
    assert part.out.dtype == dtype
    assert_close("out", part.out, expected.out, ratio)
    assert_close("lse", part.lse, expected.lse, 1e-5)


def test_mean_of_v_fails_every_tolerance():
    q, k, v = make_qkv(1, 3, 80, 16, logit_std=1.0)
    expected = near_far_attention(q, k, v, grids=[TokenGrid(8, 8, 9)], config=NearFarConfig(3, 1, 1)).out
    for ratio in (RATIO, 4e-3, 0.3):
        with pytest.raises(AssertionError, match="relative error"):
            assert_close("mean", v.mean(2, keepdim=True).expand_as(v), expected, ratio)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize("exact_queries", ["exact", "pooled"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("token", [2, 30, 79])
def test_nan_in_an_input_never_becomes_a_finite_wrong_output(impl, exact_queries, which, token):
    tensors = make_qkv(1, 2, 80, 8)
    tensors[which][0, 1, token, 3] = torch.nan
    config = NearFarConfig(3, 1, 1, exact_queries)
    out = near_far_attention(*tensors, grids=[TokenGrid(8, 8, 9)], config=config, impl=impl).out
    exact_is_nan = softmax_attention(*tensors).out.isnan()
    assert exact_is_nan.any()
    assert out[exact_is_nan].isnan().all()
    assert out[:, 0].isfinite().all()


def test_unwritten_memory_never_shows(monkeypatch):
    def poisoned(tensor, *sizes, **options):
        shape = sizes[0] if isinstance(sizes[0], torch.Size) else sizes
        return tensor.new_full(shape, torch.nan, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    q, k, v = make_qkv(2, 3, 90, 8)
    grids = [TokenGrid(5, 7, 8), TokenGrid(65, 4, 5)]
    part = near_far_attention(q, k, v, grids=grids, config=NearFarConfig((2, 3), 1, 3), impl="blocked")
    assert part.out.isfinite().all()
    assert part.lse.isfinite().all()
