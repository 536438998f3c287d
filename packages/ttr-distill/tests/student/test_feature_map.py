from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional
from ttr_distill.student.feature_map import KernelFeatureMap, seeded_linear, validate_feature_dim


@pytest.mark.parametrize("bad", [0, -256, 64, 128, 255, 257, 384, 1000])
def test_feature_dim_must_be_a_multiple_of_256(bad: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 256 and at least 256, got {bad}"):
        validate_feature_dim(bad)


@pytest.mark.parametrize("good", [256, 512, 1024])
def test_legal_feature_dims(good: int) -> None:
    assert validate_feature_dim(good) == good


def test_hidden_width_is_the_larger_of_head_width_and_twice_the_features() -> None:
    assert KernelFeatureMap(16, 256).hidden == 512
    assert KernelFeatureMap(600, 256).hidden == 600


@pytest.mark.parametrize("qk_norm", [True, False])
def test_features_equal_the_formula_in_float64(qk_norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = KernelFeatureMap(16, 256, qk_norm=qk_norm, eps=1e-3, generator=generator).double()
    x = 2 * torch.randn(2, 3, 7, 16, dtype=torch.float64, generator=generator)
    state = features.state_dict()
    for side, answer in (("phi_net_q", features.query(x)), ("phi_net_k", features.key(x))):
        hidden = x
        for index in (0, 2, 4):
            hidden = (
                torch.einsum("...i,oi->...o", hidden, state[f"{side}.{index}.weight"]) + state[f"{side}.{index}.bias"]
            )
            hidden = hidden * torch.sigmoid(hidden) if index < 4 else hidden
        expected = torch.where(hidden > 0, hidden + 1, torch.exp(hidden))
        if qk_norm:
            expected = expected / (expected.square().sum(-1, keepdim=True).sqrt() + 1e-3)
        torch.testing.assert_close(answer, expected)
        assert (answer >= 0).all()


def test_two_layers_equal_the_formula_and_have_fewer_hidden_values() -> None:
    features = KernelFeatureMap(16, 256, layers=2, qk_norm=False, generator=torch.Generator().manual_seed(0)).double()
    assert features.hidden == 256
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = features.state_dict()
    hidden = x @ state["phi_net_k.0.weight"].T + state["phi_net_k.0.bias"]
    last = functional.silu(hidden) @ state["phi_net_k.2.weight"].T + state["phi_net_k.2.bias"]
    torch.testing.assert_close(features.key(x), functional.elu(last) + 1)
    assert features.flops_per_token() == 2 * (16 * 256 + 256 * 256)
    assert KernelFeatureMap(16, 256).flops_per_token() == 2 * (16 * 512 + 512 * 512 + 512 * 256)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_every_way_to_attend_gives_the_same_partial_and_gradients(layers: Literal[2, 3], masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, generator=generator) for n, d in ((40, 16), (70, 16), (70, 8)))
    mask = torch.rand(2, 70, generator=generator) > 0.3 if masked else None
    found, gradients = [], []
    for workspace in (2**29, 1):
        features = KernelFeatureMap(
            16, 256, layers=layers, workspace_bytes=workspace, generator=torch.Generator().manual_seed(1)
        )
        part = features.attend(q, k, v, key_mask=mask, eps=1e-6)
        (part.out.square().sum() + part.lse.sum()).backward()
        gradients.append([one.grad for one in features.parameters()])
        with torch.no_grad():
            found += [part, features.attend(q, k, v, key_mask=mask, eps=1e-6)]
    weights = torch.einsum("bhqf,bhkf->bhqk", features.query(q), features.key(k)).detach()
    weights = weights if mask is None else weights * mask[:, None, None]
    for part in found:
        torch.testing.assert_close(part.out, weights @ v / weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.lse, weights.sum(-1).log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_the_norm_of_a_query_cancels_in_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 16, generator=generator) for _ in range(3))
    parts = []
    for query_norm in (True, False):
        features = KernelFeatureMap(16, 256, query_norm=query_norm, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            parts.append(features.attend(q, k, v, key_mask=None, eps=1e-6))
    torch.testing.assert_close(parts[1].out, parts[0].out, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parts[1].lse, parts[0].lse)


def test_one_network_serves_both_sides_if_not_split() -> None:
    features = KernelFeatureMap(16, 256, split_qk=False)
    assert features.phi_net_k is features.phi_net_q
    split = KernelFeatureMap(16, 256, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(split.phi_net_k[0].weight, split.phi_net_q[0].weight)


def test_a_lower_compute_dtype_never_casts_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    features = KernelFeatureMap(16, 256, dtype=torch.bfloat16, generator=generator)
    before = {name: value.clone() for name, value in features.state_dict().items()}
    x = torch.randn(1, 1, 9, 16, generator=generator)
    with torch.no_grad():
        answer = features.query(x)
        full = KernelFeatureMap(16, 256, generator=torch.Generator().manual_seed(0)).query(x)
    assert answer.dtype is torch.bfloat16
    assert 0 < functional.mse_loss(answer.float(), full).sqrt() / full.square().mean().sqrt() < 0.02
    assert all(torch.equal(features.state_dict()[name], value) for name, value in before.items())
    assert {value.dtype for value in before.values()} == {torch.float32}


def test_initial_weights_have_the_usual_distribution_and_their_own_stream() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    layer = seeded_linear(64, 400, torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(3), expected)
    usual = nn.Linear(64, 400)
    assert float(layer.weight.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)
    assert float(layer.weight.detach().std()) == pytest.approx(float(usual.weight.detach().std()), rel=0.05)
    assert float(layer.bias.detach().std()) == pytest.approx(float(usual.bias.detach().std()), rel=0.2)
    assert torch.equal(layer.weight, seeded_linear(64, 400, torch.Generator().manual_seed(3)).weight)
