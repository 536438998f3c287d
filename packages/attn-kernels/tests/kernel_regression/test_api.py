import pytest
import torch
from attn_kernels import kernel_regression, merge_partials, softmax_attention
from attn_kernels.testing import assert_close, make_qkv


def features(queries=37, keys=53, width=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi_q, phi_k = (torch.rand(2, 3, count, width, generator=generator).pow(4).to(dtype) for count in (queries, keys))
    return phi_q, phi_k, torch.randn(2, 3, keys, 5, generator=generator).to(dtype)


def quadratic(phi_q, phi_k, v, mask=None):
    weights = phi_q.double() @ phi_k.double().mT
    if mask is not None:
        weights = weights * mask[:, None, None]
    total = weights.sum(-1)
    return weights @ v.double() / total.unsqueeze(-1), total.log()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_equals_the_quadratic_form(dtype, ratio, masked):
    phi_q, phi_k, v = features(dtype=dtype)
    mask = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    part = kernel_regression(phi_q, phi_k, v, key_mask=mask)
    out, lse = quadratic(phi_q, phi_k, v, mask)
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.float32
    assert_close("out", part.out, out, ratio)
    assert_close("lse", part.lse, lse, 1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("mean of v", v.mean(2, keepdim=True).expand_as(part.out), out, ratio)


def test_merging_keys_of_a_partition_equals_the_whole():
    phi_q, phi_k, v = features()
    parts = [kernel_regression(phi_q, phi_k[:, :, s], v[:, :, s]) for s in (slice(0, 20), slice(20, 53))]
    merged, whole = merge_partials(*parts), kernel_regression(phi_q, phi_k, v)
    assert_close("out", merged.out, whole.out, 1e-6)
    assert_close("lse", merged.lse, whole.lse, 1e-5)


def test_shares_a_denominator_with_a_softmax():
    # exp(q . k) of one-dimensional features exp(k) with phi_q = 1 is a softmax whose scores are k.
    q, k, v = torch.ones(1, 1, 4, 1), make_qkv(1, 1, 9, 1)[1], make_qkv(1, 1, 9, 6)[2]
    merged = merge_partials(
        kernel_regression(q, k[:, :, :4].exp(), v[:, :, :4]), softmax_attention(q, k[:, :, 4:], v[:, :, 4:], scale=1.0)
    )
    assert_close("out", merged.out, softmax_attention(q, k, v, scale=1.0).out, 1e-6)


def test_the_order_of_keys_and_the_scale_of_features_do_not_matter():
    phi_q, phi_k, v = features()
    order = torch.randperm(53, generator=torch.Generator().manual_seed(0))
    whole = kernel_regression(phi_q, phi_k, v)
    assert_close("order", kernel_regression(phi_q, phi_k[:, :, order], v[:, :, order]).out, whole.out, 1e-6)
    scaled = kernel_regression(3 * phi_q, 2 * phi_k, v)
    assert_close("scale", scaled.out, whole.out, 1e-6)
    assert_close("log of the scale", scaled.lse, whole.lse + torch.tensor(6.0).log(), 1e-5)


def test_constant_values_are_returned():
    phi_q, phi_k, v = features()
    assert_close(
        "constant", kernel_regression(phi_q, phi_k, torch.full_like(v, 2.5)).out, torch.full((2, 3, 37, 5), 2.5), 1e-6
    )


def test_a_denominator_of_zero_is_clamped():
    phi_q, phi_k, v = features()
    part = kernel_regression(torch.zeros_like(phi_q), phi_k, v, eps=1e-3)
    assert (part.out == 0).all()
    assert_close("lse", part.lse, torch.full_like(part.lse, 1e-3).log(), 1e-6)
    nothing = kernel_regression(phi_q, phi_k, v, key_mask=torch.zeros(2, 53, dtype=torch.bool))
    assert (nothing.out == 0).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_nan(which):
    tensors = features()
    tensors[which][0, 0, 5, 2] = torch.nan
    out = kernel_regression(*tensors).out
    assert out[0, 0, 5].isnan().any()
    assert out[1].isfinite().all()


def test_masked_tokens_may_hold_nan():
    phi_q, phi_k, v = features()
    phi_k[:, :, 7], v[:, :, 8] = torch.nan, torch.nan
    mask = torch.ones(2, 53, dtype=torch.bool)
    mask[:, 7:9] = False
    assert kernel_regression(phi_q, phi_k, v, key_mask=mask).out.isfinite().all()


def test_wrong_arguments_are_named():
    phi_q, phi_k, v = features()
    with pytest.raises(ValueError, match="eps must be positive"):
        kernel_regression(phi_q, phi_k, v, eps=0.0)
    with pytest.raises(ValueError, match="head width"):
        kernel_regression(phi_q[..., :3], phi_k, v)
    with pytest.raises(ValueError, match="no impl 'fused'"):
        kernel_regression(phi_q, phi_k, v, impl="fused")
