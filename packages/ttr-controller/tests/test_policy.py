import math

import pytest
import torch
from attn_dispatch import StepContext
from ttr_controller.inputs import StepInputs
from ttr_controller.policy import PolicyConfig, RoutingPolicy, fit_policy_to_scores

STEPS = [StepContext(sigma, 3.0, (32, 48)) for sigma in (1.0, 0.9, 0.75, 0.5, 0.2)]


def test_state_names_and_sizes_are_those_of_the_reference():
    shapes = {name: tuple(tensor.shape) for name, tensor in RoutingPolicy(5).state_dict().items()}
    assert shapes == {
        "resolution_embed.proj.0.weight": (64, 128),
        "resolution_embed.proj.0.bias": (64,),
        "resolution_embed.proj.2.weight": (64, 64),
        "resolution_embed.proj.2.bias": (64,),
        "mlp.0.weight": (256, 192),
        "mlp.0.bias": (256,),
        "mlp.2.weight": (256, 256),
        "mlp.2.bias": (256,),
        "mlp.4.weight": (5, 256),
        "mlp.4.bias": (5,),
    }


def legacy_logits(state, sigma, cfg, width, height):
    """The reference net with unscaled inputs, written out."""

    def embed(x, dim=64):
        frequencies = [math.exp(-math.log(10000.0) * i / (dim // 2 - 1)) for i in range(dim // 2)]
        angles = torch.tensor([x * f for f in frequencies], dtype=torch.float64)
        return torch.cat([angles.sin(), angles.cos()])

    def linear(name, x):
        return state[f"{name}.weight"].double() @ x + state[f"{name}.bias"].double()

    def silu(x):
        return x / (1 + torch.exp(-x))

    sides = torch.cat([embed(width), embed(height)])
    resolution = linear("resolution_embed.proj.2", silu(linear("resolution_embed.proj.0", sides)))
    hidden = silu(linear("mlp.0", torch.cat([embed(sigma), embed(cfg), resolution])))
    return linear("mlp.4", silu(linear("mlp.2", hidden)))


def test_legacy_scales_reproduce_the_reference_net():
    policy = RoutingPolicy(4, PolicyConfig.legacy(), seed=3)
    expected = legacy_logits(policy.state_dict(), 0.37, 3.5, width=48 * 8.0, height=32 * 8.0)
    actual = policy(StepContext(0.37, 3.5, (32, 48)))
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-4)


def test_sigma_moves_the_embedding_only_with_scaled_inputs():
    sigmas = torch.linspace(0, 1, 9)
    moving = {}
    for name, config in (("scaled", PolicyConfig()), ("legacy", PolicyConfig.legacy())):
        moving[name] = int((RoutingPolicy(2, config).sigma_embed(sigmas).std(dim=0) > 0.1).sum())
    assert moving["legacy"] < 20
    assert moving["scaled"] > 35


def test_width_and_height_are_told_apart_and_the_whole_batch_part_is_no_input():
    policy = RoutingPolicy(3, seed=0)
    wide, tall = policy(StepContext(0.5, 3.0, (32, 64))), policy(StepContext(0.5, 3.0, (64, 32)))
    assert (wide - tall).abs().max() > 1e-3
    assert torch.equal(wide, policy(StepContext(0.5, 3.0, (32, 64), (0, 1))))


def test_several_steps_at_once_equal_one_by_one():
    policy = RoutingPolicy(3, seed=0)
    torch.testing.assert_close(policy.logits(STEPS), torch.stack([policy(step) for step in STEPS]))
    with pytest.raises(ValueError, match="no diffusion step"):
        policy.logits([])


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (RoutingPolicy(3, seed=seed).mlp[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_shift_moves_every_logit_by_the_same_amount():
    policy = RoutingPolicy(3, seed=0)
    before = policy.logits(STEPS).detach()
    policy.shift(1.5)
    torch.testing.assert_close(policy.logits(STEPS).detach(), before + 1.5)


def test_a_policy_made_and_fitted_in_inference_mode_can_be_trained():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        policy = RoutingPolicy(3, seed=0)
        fit_policy_to_scores(policy, STEPS, scores.clone(), updates=2)
    policy(STEPS[0]).sum().backward()
    assert policy.mlp[0].weight.grad is not None


def test_fit_gives_the_policy_the_ranking_of_the_scores():
    scores = torch.exp(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    policy = RoutingPolicy(6, seed=0)
    left = fit_policy_to_scores(policy, STEPS, scores, spread=2.0)
    logits = policy.logits(STEPS).detach()
    assert left < 0.05
    assert torch.equal(logits.flatten().argsort(), scores.flatten().argsort())
    assert 1.7 < logits.std() < 2.2


def test_fit_leaves_ineligible_layers_out():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scores[:, 1] = 1e6
    policy = RoutingPolicy(3, seed=0)
    fit_policy_to_scores(policy, STEPS, scores, eligible=torch.tensor([True, False, True]))
    logits = policy.logits(STEPS).detach()[:, [0, 2]]
    assert logits.mean().abs() < 0.1
    with pytest.raises(ValueError, match=r"scores must be \[5, 3\]"):
        fit_policy_to_scores(policy, STEPS, scores[:, :2])


@pytest.mark.parametrize(
    "values", [{"embed_dim": 7}, {"hidden_dim": 0}, {"sigma_scale": 0.0}, {"size_scale": math.inf}]
)
def test_settings_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
        PolicyConfig(**values)
    with pytest.raises(ValueError, match="at least one layer"):
        RoutingPolicy(0)


def test_further_inputs_move_the_answer_and_are_checked():
    config = PolicyConfig(embed_dim=16, hidden_dim=32, text_width=4, previous_error=True)
    policy = RoutingPolicy(3, config, seed=0)
    step = StepContext(0.5, 3.0, (8, 8))
    plain_answer = policy(step)
    words = [policy(step, StepInputs(text=torch.full((4,), float(sign)))) for sign in (-1, 1)]
    errors = [policy(step, StepInputs(previous_error=torch.full((3,), size))) for size in (1e-3, 1e-1)]
    for one, other in ((words[0], words[1]), (errors[0], errors[1]), (plain_answer, words[0])):
        assert (one - other).abs().max() > 0.02
    with pytest.raises(ValueError, match=r"text of width 4, got \(3,\)"):
        policy(step, StepInputs(text=torch.zeros(3)))
    with pytest.raises(ValueError, match="text_width"):
        PolicyConfig(text_width=-1)


def test_further_inputs_leave_names_and_sizes_of_the_rest():
    names = {name: tensor.shape for name, tensor in RoutingPolicy(3, seed=0).state_dict().items()}
    more = RoutingPolicy(3, PolicyConfig(text_width=4, previous_error=True), seed=0).state_dict()
    assert {name: more[name].shape for name in names} == names
    assert set(more) - set(names) == {
        f"{part}_embed.{kind}" for part in ("text", "error") for kind in ("weight", "bias")
    }


def test_several_alternatives_have_a_logit_each_and_the_last_one_zero():
    policy = RoutingPolicy(4, PolicyConfig(embed_dim=16, hidden_dim=32), seed=0, actions=3)
    steps = [StepContext(s, 3.0, (8, 8)) for s in (0.9, 0.2)]
    before = policy.logits(steps).detach()
    assert before.shape == (2, 4, 3)
    assert (before[..., 2] == 0.0).all()
    policy.shift(0.7)
    moved = policy.logits(steps).detach() - before
    assert torch.allclose(moved[..., 0], torch.full((2, 4), 0.7), atol=1e-6)
    assert moved[..., 1:].abs().max() == 0.0
    with pytest.raises(ValueError, match="one layer and two actions"):
        RoutingPolicy(4, actions=1)
    with pytest.raises(ValueError, match="one alternative"):
        fit_policy_to_scores(policy, steps, torch.rand(2, 4))
