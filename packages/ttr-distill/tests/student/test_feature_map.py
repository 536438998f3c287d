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
    answer = features.query(x)
    assert answer.dtype is torch.bfloat16
    full = KernelFeatureMap(16, 256, generator=torch.Generator().manual_seed(0)).query(x)
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
