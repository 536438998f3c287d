import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext
from ttr_controller.guard import PolicyGuard
from ttr_controller.inputs import StepInputs, ask, fixed_inputs
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.rollout import trajectory_log_prob

LAYERS = tuple(LayerKey("single", index) for index in range(3))
STEPS = tuple(StepContext(sigma, 3.0, (8, 8)) for sigma in (0.9, 0.4))
X = torch.zeros(1, 1, 2, 4)
CONFIG = PolicyConfig(embed_dim=16, hidden_dim=32, text_width=5, previous_error=True)


def test_further_inputs_are_recorded_and_scored_again_as_they_were():
    policy = RoutingPolicy(3, CONFIG, seed=0)
    text = torch.randn(5, generator=torch.Generator().manual_seed(0))
    errors = {0.9: None, 0.4: torch.tensor([0.1, 0.01, 0.5])}
    current = dict(errors)
    guard = PolicyGuard(
        policy, LAYERS, mode="sample", seed=0, inputs=lambda step: StepInputs(text, current[step.sigma])
    )
    for step in STEPS:
        guard(AttentionCall(X, X, X, layer=LAYERS[0], step=step))
    current[0.4] = torch.ones(3)  # what is known later changes nothing
    trajectory = guard.trajectory
    expected = sum(
        torch.where(full, p, 1 - p).log().sum()
        for full, p in (
            (trajectory.mask()[row], torch.sigmoid(policy(step, StepInputs(text, errors[step.sigma]))))
            for row, step in enumerate(STEPS)
        )
    )
    assert trajectory_log_prob(policy, trajectory).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_policy_without_further_inputs_need_not_know_of_them():
    assert ask(lambda step: torch.zeros(2), STEPS[0], None).tolist() == [0.0, 0.0]


def test_one_embedding_for_every_step():
    source = fixed_inputs(torch.tensor([[1.0, 3.0], [3.0, 5.0]]))
    assert source(STEPS[0]).text.tolist() == source(STEPS[1]).text.tolist() == [2.0, 4.0]
    assert fixed_inputs(None)(STEPS[0]).text is None
    with pytest.raises(ValueError, match="text must be a vector"):
        StepInputs(text=torch.zeros(2, 2))
