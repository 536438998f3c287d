import pytest
import torch
from attn_kernels import landmark_attention, merge_partials, softmax_attention
from attn_kernels.testing import assert_close, make_qkv


def scores_softmax(q, k, v, index, mask=None):
    scores = (q.double() @ k[:, :, index].double().mT) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, index], -torch.inf)
    return scores.softmax(-1) @ v[:, :, index].double(), scores.logsumexp(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_is_a_softmax_over_the_landmarks(dtype, ratio, masked, chunk):
    q, k, v = make_qkv(2, 3, 33, 16, kv_tokens=70, value_width=5, dtype=dtype, logit_std=3.0)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    index = torch.arange(0, 70, 3)
    part = landmark_attention(q, k, v, index, key_mask=mask, chunk=chunk)
    out, lse = scores_softmax(q, k, v, index, mask)
    assert part.out.dtype == dtype
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, 1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("mean of v", v.mean(2, keepdim=True).expand_as(part.out), out, 0.3)


def test_all_keys_are_exact_and_a_partition_merges():
    q, k, v = make_qkv(1, 2, 33, 16, kv_tokens=70)
    exact = softmax_attention(q, k, v)
    whole = landmark_attention(q, k, v, torch.arange(70))
    assert_close("out", whole.out, exact.out, 1e-6)
    halves = [landmark_attention(q, k, v, torch.arange(first, 70, 2)) for first in (0, 1)]
    merged = merge_partials(*halves)
    assert_close("merged", merged.out, exact.out, 1e-6)
    assert_close("lse", merged.lse, exact.lse, 1e-6)


def test_the_order_of_landmarks_does_not_matter():
    q, k, v = make_qkv(1, 2, 33, 16)
    index = torch.arange(0, 33, 2)
    a, b = landmark_attention(q, k, v, index), landmark_attention(q, k, v, index.flip(0))
    assert_close("out", b.out, a.out, 1e-6)


def test_no_landmark_left_gives_zeros_and_minus_infinity():
    q, k, v = make_qkv(2, 1, 5, 4)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    part = landmark_attention(q, k, v, torch.tensor([0, 1]), key_mask=mask)
    assert (part.out[0] == 0).all()
    assert (part.lse[0] == -torch.inf).all()
    assert part.lse[1].isfinite().all()


def test_gradients_reach_landmarks_only():
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 1, 5, 3))
    index = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, index, chunk=2), (q, k, v))
    landmark_attention(q, k, v, index).out.square().sum().backward()
    assert (v.grad[:, :, [1, 2, 4]] == 0).all()
    assert (v.grad[:, :, [0, 3]] != 0).any()


def test_wrong_arguments_are_named():
    q, k, v = make_qkv(1, 1, 5, 4)
    for index in (torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="index must be int64"):
            landmark_attention(q, k, v, index)
    with pytest.raises(ValueError, match="chunk"):
        landmark_attention(q, k, v, torch.tensor([0]), chunk=0)


def test_nan_stays_nan():
    q, k, v = make_qkv(1, 1, 5, 4)
    k[0, 0, 3] = torch.nan
    assert landmark_attention(q, k, v, torch.tensor([0, 3])).out.isnan().all()
    assert landmark_attention(q, k, v, torch.tensor([0, 2])).out.isfinite().all()
