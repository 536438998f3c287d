from collections.abc import Callable

import pytest
import torch
from attn_dispatch import AttentionCall
from ttr_distill.student.exp_feature_map import ExpFeatureMap

CallMaker = Callable[..., AttentionCall]


def made(hidden: int = 0, features: int = 12) -> ExpFeatureMap:
    """A map whose sides and heads all differ."""
    generator = torch.Generator().manual_seed(0)
    feature_map = ExpFeatureMap(2, 16, features, hidden=hidden, generator=generator)
    with torch.no_grad():
        for weight in feature_map.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return feature_map


@pytest.mark.parametrize("hidden", [0, 5])
def test_answers_equal_the_formula_key_by_key(make_call: CallMaker, hidden: int) -> None:
    call = make_call(0, dtype=torch.float64, rows=5, columns=4)
    feature_map = made(hidden).double()
    state = feature_map.state_dict()
    outs, lses = [], []
    for head in range(2):
        sides = []
        for side, x in (("query_side", call.q[0, head]), ("key_side", call.k[0, head])):
            if hidden:
                x = x @ state[f"{side}.first"][head].T + state[f"{side}.first_bias"][head]
                x = x * torch.sigmoid(x)
            y = x @ state[f"{side}.weight"][head].T + state[f"{side}.bias"][head]
            sides.append(torch.cat([y.exp(), (-y).exp()], dim=-1))
        weights = sides[0] @ sides[1].T
        outs.append(weights @ call.v[0, head] / weights.sum(-1, keepdim=True))
        lses.append(weights.sum(-1).log())
    part = feature_map.attend(call.q, call.k, call.v, key_mask=None, eps=1e-6)
    torch.testing.assert_close(part.out[0], torch.stack(outs))
    torch.testing.assert_close(part.lse[0], torch.stack(lses))
    torch.testing.assert_close(feature_map.query(call.q)[0, 1] @ feature_map.key(call.k)[0, 1].T, weights)


def test_exponents_that_overflow_do_not(make_call: CallMaker) -> None:
    call = make_call(0)
    feature_map = made()
    with torch.no_grad():
        for side in (feature_map.query_side, feature_map.key_side):
            side.weight.mul_(100.0)
    part = feature_map.attend(call.q, call.k, call.v, key_mask=None, eps=1e-6)
    assert not feature_map.query(call.q).isfinite().all()
    assert part.out.isfinite().all()
    assert part.lse.isfinite().all()


def test_agreement_of_query_and_key_weighs_more_from_the_start(make_call: CallMaker) -> None:
    call = make_call(0)
    feature_map = ExpFeatureMap(2, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = feature_map.query(call.q) @ feature_map.key(call.k).transpose(-1, -2)
    logits = call.q @ call.k.transpose(-1, -2)
    # Per query: how keys compare for one query is what attention is about.
    both = torch.stack([weights.log(), logits])
    both = both - both.mean(-1, keepdim=True)
    assert float((both[0] * both[1]).sum() / (both[0].norm() * both[1].norm())) > 0.25
    assert feature_map.query_side.weight.data_ptr() != feature_map.key_side.weight.data_ptr()


def test_gradients_reach_both_sides_and_both_layers(make_call: CallMaker) -> None:
    call = make_call(0)
    feature_map = made(5)
    part = feature_map.attend(call.q, call.k, call.v, key_mask=None, eps=1e-6)
    (part.out.square().sum() + part.lse.sum()).backward()
    assert len(list(feature_map.parameters())) == 8
    for weight in feature_map.parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_half_precision_weights_multiply_in_half_precision(make_call: CallMaker) -> None:
    call = make_call(0, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = made(5).attend(call.q.float(), call.k.float(), call.v.float(), key_mask=None, eps=1e-6).out
        half = made(5).to(torch.bfloat16).attend(call.q, call.k, call.v, key_mask=None, eps=1e-6).out
    assert half.dtype is torch.bfloat16
    assert 1e-4 < float((half.float() - exact).norm() / exact.norm()) < 0.03


def test_cost_and_settings() -> None:
    assert ExpFeatureMap(2, 16, 64).flops_per_token() == 2 * 16 * 32
    assert ExpFeatureMap(2, 16, 64, hidden=24).flops_per_token() == 2 * (16 * 24 + 24 * 32)
    for features, hidden in ((7, 0), (0, 0), (8, -1)):
        with pytest.raises(ValueError, match="feature_dim must be even"):
            ExpFeatureMap(2, 16, features, hidden=hidden)
