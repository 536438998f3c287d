import pytest
import torch
from attn_dispatch import StepContext
from ttr_controller.step_metrics import reward_metrics, routing_metrics

CONTEXTS = tuple(StepContext(sigma, 3.0, (8, 12)) for sigma in (1.0, 0.6, 0.1))
MASKS = (
    torch.tensor([[True, True, True], [True, False, True], [False, False, True]]),
    torch.tensor([[True, False, True], [False, False, True], [False, True, True]]),
)
ELIGIBLE = torch.tensor([True, True, False])


def test_shares_over_ready_and_over_all_layers():
    row = routing_metrics(CONTEXTS, MASKS, torch.full((3, 3), 0.25), ELIGIBLE, 0.4)
    assert row["full_attn_eligible"] == pytest.approx(5 / 12)
    assert row["full_attn_overall"] == pytest.approx(11 / 18)
    assert row["ttr_overall"] == pytest.approx(7 / 18)
    assert row["expected_full_attn_eligible"] == pytest.approx(0.25)
    assert row["expected_full_attn_overall"] == pytest.approx(0.5)
    assert (row["eligible_ttr_layers"], row["forced_full_layers"]) == (2.0, 1.0)
    assert row["target_ttr_ratio"] == pytest.approx(0.6)
    assert (row["width"], row["height"], row["steps_per_trajectory"]) == (12.0, 8.0, 3.0)


def test_shares_at_high_and_low_noise():
    row = routing_metrics(CONTEXTS, MASKS, torch.full((3, 3), 0.25), ELIGIBLE, 0.4)
    assert row["ttr_ratio_high_sigma"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert row["ttr_ratio_low_sigma"] == pytest.approx(3 / 4)
    assert row["ttr_ratio_spread"] == pytest.approx(-1 / 4)
    short = routing_metrics(CONTEXTS[:2], [mask[:2] for mask in MASKS], torch.ones(2, 3), ELIGIBLE, 0.4)
    assert "ttr_ratio_low_sigma" not in short
    assert "ttr_ratio_spread" not in short


def test_rewards():
    rewards = torch.tensor([-0.5, -0.7])
    row = reward_metrics(rewards, rewards - rewards.mean(), -rewards, torch.tensor([0.1, 0.3]), 0.5, -0.6)
    assert row["reward"] == pytest.approx(-0.6)
    assert row["reward_quality"] == pytest.approx(-0.6)
    assert row["efficiency_penalty_weighted"] == pytest.approx(0.1)
    assert row["baselined_reward"] == pytest.approx(0.0, abs=1e-7)
    assert reward_metrics(rewards[:1], rewards[:1], -rewards[:1], rewards[:1], 0.5, 0.0)["reward_spread"] == 0.0
