"""The Triton kernels equal the reference, in the interpreter on the CPU or on the GPU."""

import pytest
import torch
from attn_kernels import TokenGrid
from attn_kernels.testing import assert_close, make_qkv
from attn_kernels.triton_support import refuse_fused
from attn_kernels.window import window_attention, window_attention_2d

GRIDS = (TokenGrid(5, 9, 13), TokenGrid(124, 3, 4))
LENGTH = 139
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]

pytestmark = [
    pytest.mark.skipif(
        refuse_fused("fused", torch.empty(0)) is not None and not torch.cuda.is_available(),
        reason="needs Triton's interpreter or a GPU",
    ),
    pytest.mark.usefixtures("poison"),
]


def move(*tensors):
    there = "cpu" if refuse_fused("fused", torch.empty(0)) is None else "cuda"
    return [None if x is None else x.to(there) for x in tensors]


def assert_same(operator, tensors, key_mask, ratio, **options):
    q, k, v, key_mask = move(*tensors, key_mask)
    part = operator(q, k, v, key_mask=key_mask, impl="fused", **options)
    expected = operator(q.float(), k.float(), v.float(), key_mask=key_mask, impl="reference", **options)
    assert part.out.dtype == v.dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out, expected.out, ratio)
    assert_close("lse", part.lse, expected.lse, ratio)
    return part


def mask_for(batch, keys):
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "width", "value_width", "window", "prefix", "chunk", "masked"),
    [
        (2, 2, 63, 63, 24, 24, 9, 0, 1, False),
        (1, 2, 150, 90, 64, 40, 20, 37, 1, True),
        (2, 1, 70, 201, 16, 33, 3, 5, 16, True),
        (1, 1, 100, 100, 80, 80, 200, 0, 1, False),
    ],
)
def test_1d_equals_the_reference(
    dtype, ratio, batch, heads, queries, keys, width, value_width, window, prefix, chunk, masked
):
    tensors = make_qkv(
        batch, heads, queries, width, kv_tokens=keys, value_width=value_width, logit_std=3.0, dtype=dtype
    )
    options = {"window": window, "prefix": prefix, "chunk": chunk}
    assert_same(window_attention, tensors, mask_for(batch, keys) if masked else None, ratio, **options)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize(
    ("width", "value_width", "radius", "exact_queries", "masked"),
    [
        (24, 24, 2, "exact", False),
        (64, 20, (1, 6), "local", True),
        (16, 72, (30, 0), "exact", True),
    ],
)
def test_2d_equals_the_reference(dtype, ratio, width, value_width, radius, exact_queries, masked):
    tensors = make_qkv(1, 2, LENGTH, width, value_width=value_width, logit_std=3.0, dtype=dtype)
    key_mask = mask_for(1, LENGTH) if masked else None
    options = {"grids": GRIDS, "radius": radius, "exact_queries": exact_queries}
    assert_same(window_attention_2d, tensors, key_mask, ratio, **options)


@pytest.mark.parametrize(("window", "prefix"), [(200, 0), (0, 65)])
def test_a_last_block_of_a_single_key_is_seen(window, prefix):
    # 65 keys: one more than blocks of 16, 32 or 64 hold.
    tensors = make_qkv(1, 1, 65, 16, logit_std=3.0)
    assert_same(window_attention, tensors, None, 1e-5, window=window, prefix=prefix)
    options = {"grids": [TokenGrid(65 if prefix else 0, 5, 13)], "radius": 13}
    tensors = make_qkv(1, 1, options["grids"][0].stop, 16, logit_std=3.0)
    assert_same(window_attention_2d, tensors, None, 1e-5, **options)


def test_a_grid_alone_and_text_on_both_sides():
    for grid, length in ((TokenGrid(0, 7, 9), 63), (TokenGrid(4, 7, 9), 80)):
        tensors = make_qkv(1, 1, length, 16, logit_std=3.0)
        for exact_queries in ("exact", "local"):
            assert_same(window_attention_2d, tensors, None, 1e-5, grids=[grid], radius=1, exact_queries=exact_queries)


def test_strided_inputs_and_a_scale():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make_qkv(2, 3, 70, 16))
    assert_same(window_attention, (q, k, v), None, 1e-5, window=5, prefix=2, scale=-0.4)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert_same(window_attention, turned, mask_for(70, 2).T, 1e-5, window=5, prefix=2)


def test_queries_without_keys_and_masked_nan():
    q, k, v = make_qkv(1, 2, 90, 8, kv_tokens=30)
    part = assert_same(window_attention, (q, k, v), None, 1e-5, window=4)
    assert (part.lse[:, :, 34:] == -torch.inf).all()
    key_mask = mask_for(1, 30)
    hole = ~key_mask[:, None, :, None]
    holed = (q, k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.inf))
    assert_same(window_attention, holed, key_mask, 1e-5, window=4, prefix=6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_never_hidden(which):
    tensors = make_qkv(1, 2, 60, 8)
    tensors[which][0, 1, 21, 3] = torch.nan
    q, k, v = move(*tensors)
    part = window_attention(q, k, v, window=4, impl="fused")
    expected = window_attention(q, k, v, window=4, impl="reference")
    seen = slice(21, 22) if which == 0 else slice(17, 26)
    assert expected.out[0, 1, seen].isnan().any(dim=-1).all()
    assert part.out[0, 1, seen].isnan().any(dim=-1).all()
    assert part.out[0, 0].isfinite().all()


def test_refusals():
    q, k, v = move(*make_qkv(1, 1, 20, 8))
    with pytest.raises(ValueError, match="float64"):
        window_attention(q.double(), k.double(), v.double(), window=1, impl="fused")
    wide = q.new_zeros(1, 1, 20, 300)
    with pytest.raises(ValueError, match="wider than 256"):
        window_attention(wide, wide, v, window=1, impl="fused")
    with pytest.raises(ValueError, match="no gradient"):
        window_attention(q.requires_grad_(), k, v, window=1, impl="fused")
