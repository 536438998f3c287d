import pytest
import torch
from attn_kernels import cosine_distance, fidelity, relative_l2, softmax_attention
from attn_kernels.testing import make_qkv


def test_known_vectors():
    target = torch.tensor([[[[3.0, 0.0], [0.0, 2.0]]]])
    output = torch.tensor([[[[3.0, 4.0], [0.0, -2.0]]]])
    assert cosine_distance(output, target).flatten().tolist() == pytest.approx([0.4, 2.0])
    assert relative_l2(output, target).item() == pytest.approx((32 / 13) ** 0.5)
    found = fidelity(output, target)
    assert found.cosine_distance == pytest.approx(1.2)
    assert found.relative_l2 == pytest.approx((32 / 13) ** 0.5)
    assert found.nmse == pytest.approx(32 / 13)


def test_equal_is_zero_and_scaling_leaves_the_angle():
    target = make_qkv(2, 3, 17, 8)[0]
    assert fidelity(target, target) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert fidelity(3 * target, target).cosine_distance == pytest.approx(0.0, abs=1e-6)
    assert fidelity(3 * target, target).relative_l2 == pytest.approx(2.0)


def test_zero_vectors():
    zero, one = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    assert cosine_distance(zero, zero).item() == 0.0
    assert cosine_distance(zero, one).item() == 1.0


def test_mean_of_v_is_far_from_attention():
    q, k, v = make_qkv(1, 2, 65, 16, logit_std=2.0)
    found = fidelity(v.mean(2, keepdim=True).expand_as(v), softmax_attention(q, k, v).out)
    assert found.cosine_distance > 0.3
    assert found.relative_l2 > 0.6


def test_nan_is_reported():
    target = torch.ones(1, 1, 3, 4)
    output = target.clone()
    output[0, 0, 1, 2] = torch.nan
    assert all(value != value for value in fidelity(output, target))


def test_half_precision_is_measured_in_float32():
    target = torch.full((1, 1, 1, 4), 300.0, dtype=torch.float16)
    assert fidelity(target, target).relative_l2 == 0.0
    assert cosine_distance(target, target).dtype == torch.float32


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        fidelity(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 1, 4))
