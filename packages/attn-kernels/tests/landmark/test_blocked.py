import pytest
import torch
from attn_kernels import landmark_attention
from attn_kernels.landmark.blocked import landmark_blocked
from attn_kernels.landmark.reference import landmark_reference
from attn_kernels.testing import assert_close, make_qkv


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("width", [5, 40])
def test_equals_the_reference(dtype, ratio, width):
    q, k, v = make_qkv(2, 3, 33, 16, kv_tokens=70, value_width=width, dtype=dtype)
    bias = torch.randn(2, 70, generator=torch.Generator().manual_seed(0)).to(torch.promote_types(dtype, torch.float32))
    bias[:, 3:9], k[:, :, 4] = -torch.inf, torch.nan
    part = landmark_blocked(q, k, v, bias, scale=0.3, chunk=512)
    expected = landmark_reference(q, k, v, bias, scale=0.3, chunk=7)
    assert_close("out", part.out, expected.out, ratio)
    assert_close("lse", part.lse, expected.lse, max(ratio, 1e-6))


def test_is_what_auto_takes_without_a_gradient():
    q, k, v = make_qkv(1, 2, 33, 16)
    index = torch.arange(0, 33, 2)
    assert torch.equal(landmark_attention(q, k, v, index).out, landmark_attention(q, k, v, index, impl="blocked").out)
    assert landmark_attention(q, k, v.requires_grad_(), index).out.requires_grad
    assert landmark_attention(q[:, :, :0], k, v.detach(), index).out.shape == (1, 2, 0, 16)
