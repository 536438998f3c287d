import math

import pytest
import torch
from attn_kernels import (
    NearFarConfig,
    TokenGrid,
    cosine_distance,
    fidelity,
    kernel_regression,
    landmark_attention,
    near_far_attention,
    relative_l2,
    softmax_attention,
)
from attn_kernels.fidelity import (
    attention_kl,
    probed_attention,
    sampled_attention,
    top_k_overlap,
    upper_quantile,
    weight_fidelity,
)
from attn_kernels.testing import assert_close, make_qkv


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
    assert fidelity(target, target) == pytest.approx((0.0,) * 5, abs=1e-6)
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


def test_tails_are_those_of_the_sorted_distances():
    target = make_qkv(1, 4, 50, 8, seed=1)[0]
    output = target + 0.3 * make_qkv(1, 4, 50, 8, seed=2)[0]
    distances = sorted(cosine_distance(output, target).flatten().tolist())
    found = fidelity(output, target)
    assert found.cosine_p95 == pytest.approx(distances[189])
    assert found.cosine_p99 == pytest.approx(distances[197])


def test_upper_quantile_is_the_nearest_rank():
    values = torch.arange(1.0, 21.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))].view(4, 5)
    assert [upper_quantile(values, share).item() for share in (0.0, 0.05, 0.95, 0.951, 1.0)] == [1, 1, 19, 20, 20]
    values[2, 3] = torch.nan
    assert math.isnan(upper_quantile(values, 0.5).item())
    with pytest.raises(ValueError, match="at least one value"):
        upper_quantile(values[:0], 0.5)


@pytest.fixture
def tensors():
    q, k, v = make_qkv(2, 3, 75, 16, logit_std=2.0, smooth_grid=TokenGrid(5, 7, 10))
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[1, [2, 9, 70]] = False
    return q, k, v, mask, torch.tensor([0, 3, 41, 74])


def test_sampled_weights_average_the_values_as_attention_does(tensors):
    q, k, v, mask, index = tensors
    weights = sampled_attention(q, k, index, key_mask=mask)
    assert_close("rows", weights @ v, softmax_attention(q, k, v, key_mask=mask).out[:, :, index], 1e-6)
    assert weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * 24)
    assert not weights[1, :, :, 9].any()
    assert not sampled_attention(q, k, index, key_mask=torch.zeros_like(mask)).any()


@pytest.mark.parametrize("chunk", [1, 32, 75, 128])
def test_probing_exact_attention_yields_its_weights(tensors, chunk):
    q, k, v, mask, index = tensors
    found = probed_attention(lambda x: softmax_attention(q, k, x, key_mask=mask).out, v, index, chunk=chunk)
    assert_close("weights", found, sampled_attention(q, k, index, key_mask=mask), 1e-6)


def test_probing_yields_the_weights_behind_the_output(tensors):
    q, k, v, mask, index = tensors
    phi_q, phi_k = q.exp(), k.exp()
    operators = {
        "near-far": lambda x: (
            near_far_attention(q, k, x, grids=[TokenGrid(5, 7, 10)], config=NearFarConfig(3, 1, 1), key_mask=mask).out
        ),
        "landmarks": lambda x: landmark_attention(q, k, x, torch.arange(0, 75, 2), key_mask=mask).out,
        "regression": lambda x: kernel_regression(phi_q, phi_k, x, key_mask=mask).out,
    }
    for name, operator in operators.items():
        weights = probed_attention(operator, v, index)
        assert_close(name, weights @ v, operator(v)[:, :, index], 1e-5)
        assert_close(f"{name}, all rows", probed_attention(operator, v)[:, :, index], weights, 1e-6)


def test_divergence_of_known_weights():
    exact = torch.tensor([[[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]], dtype=torch.float64)
    other = torch.tensor([[[[0.25, 0.5, 0.25], [0.5, -0.5, 0.5], [0.2, 0.3, 0.5]]]], dtype=torch.float64)
    known = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(2), 0.0]
    assert attention_kl(exact, other).flatten().tolist() == pytest.approx(known, abs=1e-6)
    # The scale of the weights is not their business.
    assert attention_kl(exact, 3 * other).flatten().tolist() == pytest.approx(known, abs=1e-6)
    dropped = attention_kl(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), floor=1e-6)
    assert dropped.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-6), rel=1e-3)


def test_divergence_is_never_negative_and_zero_for_equals(tensors):
    q, k, _, _, index = tensors
    exact = sampled_attention(q, k, index)
    assert attention_kl(exact, exact).abs().max() < 1e-5
    assert attention_kl(exact, sampled_attention(2 * q, k, index)).min() > 0.01


def test_overlap_of_known_weights():
    exact = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    other = torch.tensor([[0.3, 0.1, 0.4, 0.2], [0.4, 0.3, 0.2, 0.1]])
    assert top_k_overlap(exact, other, 2).tolist() == [0.5, 0.0]
    assert top_k_overlap(exact, other, 4).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="from 1 to the 4 keys"):
        top_k_overlap(exact, other, 5)


def test_better_near_far_settings_have_better_weights(tensors):
    q, k, v, _, index = tensors
    exact = sampled_attention(q, k, index)

    def measured(config):
        run = lambda x: near_far_attention(q, k, x, grids=[TokenGrid(5, 7, 10)], config=config).out  # noqa: E731
        return weight_fidelity(exact, probed_attention(run, v, index), count=10)

    coarse, fine = measured(NearFarConfig(5, 0, 0)), measured(NearFarConfig(2, 1, 4))
    assert 0 < fine.kl < 0.7 * coarse.kl
    assert fine.kl <= fine.kl_p95
    assert fine.top_k_overlap > coarse.top_k_overlap


def test_nan_in_the_weights_is_reported(tensors):
    q, k, _, _, index = tensors
    exact = sampled_attention(q, k, index)
    broken = exact.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert math.isnan(weight_fidelity(exact, broken).kl)
    assert math.isnan(weight_fidelity(exact, broken).kl_p95)


def test_bad_arguments_are_named(tensors):
    q, k, v, _, _ = tensors
    with pytest.raises(ValueError, match="index must be int64"):
        sampled_attention(q, k, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        probed_attention(lambda x: x, v, chunk=0)
    with pytest.raises(ValueError, match="floor must be positive"):
        attention_kl(q, k, floor=0.0)
