import pytest
import torch
from attn_kernels.kernel_regression.reference import kernel_regression_reference
from attn_kernels.testing import assert_close


def features(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    phi_q, phi_k = (torch.rand(1, 2, count, 4, generator=generator, dtype=dtype) for count in (7, 11))
    return phi_q, phi_k, torch.randn(1, 2, 11, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 3, 7, 11, 100])
def test_the_chunk_does_not_matter(chunk):
    mask = torch.arange(11)[None] != 4
    whole = kernel_regression_reference(*features(), key_mask=mask, eps=1e-6)
    part = kernel_regression_reference(*features(), key_mask=mask, eps=1e-6, chunk=chunk)
    assert_close("out", part.out, whole.out, 1e-6)
    assert_close("lse", part.lse, whole.lse, 1e-6)


def test_gradcheck_through_the_chunks():
    tensors = [x.requires_grad_() for x in features(torch.double)]
    mask = torch.arange(11)[None] != 4

    def run(phi_q, phi_k, v):
        return kernel_regression_reference(phi_q, phi_k, v, key_mask=mask, eps=1e-6, chunk=3)

    assert torch.autograd.gradcheck(run, tensors)
    grad = torch.autograd.grad(run(*tensors).out.square().sum(), tensors[1:])
    assert all((g[:, :, 4] == 0).all() for g in grad)


def test_no_queries():
    phi_q, phi_k, v = features()
    part = kernel_regression_reference(phi_q[:, :, :0], phi_k, v, key_mask=None, eps=1e-6)
    assert part.out.shape == (1, 2, 0, 3)
    assert part.lse.shape == (1, 2, 0)
