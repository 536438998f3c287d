import pytest
import torch
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from torch.nn import functional as F


def direct(q, k, v, scale, key_mask=None, bias=None):
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) * scale
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.exp()
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, v.double()), total.squeeze(-1).log()


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_in_float64(dtype, ratio, masked):
    q, k, v = make_qkv(2, 3, 37, 24, kv_tokens=53, value_width=10, dtype=dtype, logit_std=3.0)
    mask = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    bias = torch.randn(1, 3, 1, 53, generator=torch.Generator().manual_seed(2))
    part = softmax_attention(q, k, v, scale=0.2, key_mask=mask, attn_bias=bias)
    out, lse = direct(q, k, v, 0.2, mask, bias)
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, 1e-6)


def test_equals_torch():
    q, k, v = make_qkv(1, 2, 63, 16)
    assert_close("out", softmax_attention(q, k, v).out, F.scaled_dot_product_attention(q, k, v), 1e-6)


def test_mean_of_v_fails():
    q, k, v = make_qkv(1, 2, 63, 16, logit_std=1.0)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("mean", v.mean(2, keepdim=True).expand_as(v), softmax_attention(q, k, v).out, 0.3)


def test_large_scores_do_not_overflow():
    q, k, v = make_qkv(1, 1, 9, 8, logit_std=500.0)
    part = softmax_attention(q, k, v)
    assert torch.isfinite(part.out).all()
    assert torch.isfinite(part.lse).all()


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    q, k, v = (x.double().requires_grad_() for x in make_qkv(2, 1, 4, 4))
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    part = softmax_attention(q, k, v, key_mask=mask)
    assert (part.out[1] == 0).all()
    assert (part.lse[1] == -torch.inf).all()
    part.out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
    assert (q.grad[1] == 0).all()
    assert (q.grad[0] != 0).any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_nan(which):
    tensors = make_qkv(1, 1, 6, 4)
    tensors[which][0, 0, 2, 1] = torch.nan
    assert softmax_attention(*tensors).out[0, 0, 2].isnan().any()
