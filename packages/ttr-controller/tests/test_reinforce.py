import math
from itertools import product

import pytest
import torch
from ttr_controller.reinforce import (
    EmaBaseline,
    bernoulli_log_prob,
    categorical_entropy,
    categorical_log_prob,
    entropy,
    leave_one_out_advantage,
    policy_loss,
    sigma_weights,
)


def test_log_prob_is_that_of_independent_coins():
    logits = torch.tensor([[0.3, -2.0, 40.0], [-40.0, 1.5, 0.0]], dtype=torch.float64)
    actions = torch.tensor([[True, True, True], [False, False, True]])
    p = 1 / (1 + torch.exp(-logits))
    expected = torch.where(actions, p, 1 - p).log().sum(dim=1)
    torch.testing.assert_close(bernoulli_log_prob(logits, actions), expected)


def test_log_prob_stays_finite_where_a_probability_rounds_to_zero():
    log_prob = bernoulli_log_prob(torch.tensor([200.0]), torch.tensor([False]))
    assert log_prob.item() == pytest.approx(-200.0)


def test_ineligible_layers_get_neither_log_prob_nor_gradient():
    logits = torch.tensor([[0.4, -1.0, 2.0]], requires_grad=True)
    eligible = torch.tensor([True, False, True])
    actions = torch.tensor([[True, True, False]])
    value = bernoulli_log_prob(logits, actions, eligible).sum() + entropy(logits, eligible)
    value.backward()
    alone = bernoulli_log_prob(logits[:, [0, 2]], actions[:, [0, 2]]).sum() + entropy(logits[:, [0, 2]])
    assert value.item() == pytest.approx(alone.item(), abs=1e-6)
    assert logits.grad[0, 1] == 0.0
    assert (logits.grad[0, [0, 2]] != 0.0).all()


def test_entropy_and_its_gradient():
    logits = torch.tensor([[0.0, 1.3], [-3.0, 60.0]], dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logits.detach()).clamp(1e-15, 1 - 1e-15)
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    value = entropy(logits)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    value.backward()
    # dH/dx = -x p (1 - p)
    torch.testing.assert_close(logits.grad, -logits.detach() * p * (1 - p) / 4, atol=1e-12, rtol=1e-6)
    assert entropy(torch.zeros(5, 3)).item() == pytest.approx(math.log(2))


def test_entropy_needs_an_eligible_layer():
    with pytest.raises(ValueError, match="no layer is eligible"):
        entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool))


def test_advantage_is_reward_minus_mean_of_the_others():
    rewards = torch.tensor([-0.5, -0.9, -0.1, -0.7], dtype=torch.float64)
    expected = [rewards[k] - rewards[[j for j in range(4) if j != k]].mean() for k in range(4)]
    torch.testing.assert_close(leave_one_out_advantage(rewards), torch.stack(expected))
    with pytest.raises(ValueError, match="K >= 2"):
        leave_one_out_advantage(rewards[:1])


@pytest.mark.parametrize("constant", [-0.6, -0.2, 3.0])
def test_constant_reward_gives_no_gradient(constant):
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    actions = torch.bernoulli(torch.sigmoid(logits.detach()), generator=torch.Generator().manual_seed(1))
    advantages = leave_one_out_advantage(torch.full((4,), constant))
    policy_loss(bernoulli_log_prob(logits, actions), advantages, entropy(logits)).backward()
    assert logits.grad.abs().max() < 1e-6


def test_expected_gradient_equals_the_analytic_one_on_two_layers():
    """All pairs of rollouts of two layers, weighted by their probability, against the gradient of the exact mean."""
    logits = torch.tensor([0.7, -1.1], dtype=torch.float64)
    table = torch.tensor([[-0.9, -0.2], [-0.4, -0.35]], dtype=torch.float64)  # reward of [action 0][action 1]
    actions = [torch.tensor(pair) for pair in product([0, 1], repeat=2)]
    p = torch.sigmoid(logits)
    exact = torch.zeros(2, dtype=torch.float64)
    exact[0] = p[0] * (1 - p[0]) * sum((table[1, b] - table[0, b]) * (p[1] if b else 1 - p[1]) for b in (0, 1))
    exact[1] = p[1] * (1 - p[1]) * sum((table[a, 1] - table[a, 0]) * (p[0] if a else 1 - p[0]) for a in (0, 1))

    mean = torch.zeros(2, dtype=torch.float64)
    for first, second in product(actions, repeat=2):
        free = logits.clone().requires_grad_()
        both = torch.stack([first, second])
        log_probs = bernoulli_log_prob(free.expand(2, 2), both)
        rewards = torch.stack([table[tuple(first)], table[tuple(second)]])
        loss = policy_loss(log_probs, leave_one_out_advantage(rewards), entropy(free), entropy_weight=0.0)
        (gradient,) = torch.autograd.grad(loss, free)
        mean += log_probs.detach().sum().exp() * gradient
    torch.testing.assert_close(mean, -exact)


def test_loss_adds_the_entropy_bonus_and_keeps_gradient_off_the_advantages():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -0.5], requires_grad=True)
    bonus = torch.tensor(0.6, requires_grad=True)
    loss = policy_loss(log_probs, advantages, bonus, entropy_weight=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 * -1.0 + -0.5 * -2.0) / 2 - 0.06)
    assert advantages.grad is None
    assert bonus.grad.item() == pytest.approx(-0.1)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="must have one shape"):
        bernoulli_log_prob(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"eligible must be \[L\]"):
        bernoulli_log_prob(torch.zeros(3), torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"both be \[K\]"):
        policy_loss(torch.zeros(3), torch.zeros(2), torch.zeros(()))


def test_one_alternative_of_logit_zero_makes_the_categorical_a_bernoulli():
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0]])
    full = torch.tensor([[True, False], [False, True]])
    pair = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    torch.testing.assert_close(categorical_log_prob(pair, (~full).long()), bernoulli_log_prob(logits, full))
    torch.testing.assert_close(categorical_entropy(pair), entropy(logits))


def test_the_policy_gradient_of_two_layers_is_the_analytic_one():
    """``d/dx E[R] = sum over actions of R(a) p(a) (a - p)``, over every action weighted by its chance."""
    logits = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logits.detach())
    reward_of = {(0, 0): -1.0, (0, 1): 0.3, (1, 0): 2.0, (1, 1): -0.4}
    expected = torch.zeros(2, dtype=torch.float64)
    estimate = torch.zeros(2, dtype=torch.float64)
    for actions, value in reward_of.items():
        taken = torch.tensor(actions, dtype=torch.float64)
        chance = torch.where(taken == 1, p, 1 - p).prod()
        expected += value * chance * (taken - p)
        loss = policy_loss(
            bernoulli_log_prob(logits[None], taken[None].bool()),
            torch.tensor([value], dtype=torch.float64),
            entropy(logits[None]),
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        estimate -= chance * gradient
    torch.testing.assert_close(estimate, expected)
    mean = sum(
        v * torch.where(torch.tensor(a) == 1, torch.sigmoid(logits), 1 - torch.sigmoid(logits)).prod()
        for a, v in reward_of.items()
    )
    torch.testing.assert_close(torch.autograd.grad(mean, logits)[0], expected)


def test_categorical_log_prob_and_entropy_leave_forbidden_actions_out():
    logits = torch.tensor([[0.2, 1.0, -0.5], [0.7, 0.1, 3.0]], requires_grad=True)
    allowed = torch.tensor([[True, True, False], [True, False, False]])
    value = categorical_log_prob(logits, torch.tensor([1, 0]), allowed)
    assert value.item() == pytest.approx(math.log(math.exp(1.0) / (math.exp(0.2) + math.exp(1.0))), rel=1e-5)
    (value + categorical_entropy(logits, allowed)).backward()
    assert logits.grad[0, 2] == 0.0
    assert (logits.grad[1] == 0.0).all()
    assert (logits.grad[0, :2] != 0.0).all()
    p = torch.softmax(torch.tensor([0.2, 1.0]), 0)
    assert categorical_entropy(logits, allowed).item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="no layer is eligible"):
        categorical_entropy(logits, torch.tensor([[True, False, False]] * 2))
    with pytest.raises(ValueError, match=r"allowed must be \[L, A\]"):
        categorical_log_prob(logits, torch.tensor([1, 0]), allowed[:1])


def test_running_mean_baseline_compares_with_what_came_before():
    baseline = EmaBaseline(decay=0.5, floor=-0.3)
    assert baseline.advantages(torch.tensor([-0.2])).tolist() == pytest.approx([-0.2])
    assert baseline.value == pytest.approx(-0.2)
    # The floor keeps the mean up, so that the advantage stays negative.
    assert baseline.advantages(torch.tensor([-0.9, -0.9])).tolist() == pytest.approx([-0.7, -0.7])
    assert baseline.value == pytest.approx(-0.275)
    assert baseline.count == 3


def test_sigma_weights_favour_late_steps():
    assert sigma_weights([1.0, 0.5, 0.02]).tolist() == pytest.approx([0.1, 0.5, 0.98])
