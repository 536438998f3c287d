"""What one update of the controller is told to sinks, under the names that the reference node pack's charts use.

"Eligible" counts layers whose student may run, "overall" all layers, those that are forced full included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attn_dispatch.call import StepContext
from torch import Tensor

MetricRow = dict[str, float]
HIGH_SIGMA = 0.5
LOW_SIGMA = 0.2


def routing_metrics(
    contexts: Sequence[StepContext], masks: Sequence[Tensor], probabilities: Tensor, eligible: Tensor, target: float
) -> MetricRow:
    """Shares of full attention and of students.

    Args:
        contexts: The diffusion steps.
        masks: Where full attention ran, ``[steps, L]`` bool, one per rollout.
        probabilities: ``[steps, L]``, the policy's probability of full attention.
        eligible: ``[L]`` bool.
        target: Wanted share of full attention.
    """
    ran = torch.stack([mask.float() for mask in masks]).mean(dim=0)
    expected = torch.where(eligible, probabilities, 1.0)
    shares = {
        "full_attn_eligible": float(ran[:, eligible].mean()),
        "full_attn_overall": float(ran.mean()),
        "expected_full_attn_eligible": float(expected[:, eligible].mean()),
        "expected_full_attn_overall": float(expected.mean()),
    }
    row = shares | {name.replace("full_attn", "ttr"): 1.0 - value for name, value in shares.items()}
    actual, likely = row["full_attn_eligible"], row["expected_full_attn_eligible"]
    row |= {
        "mask_mean": actual,
        "probs_mean": likely,
        "full_attn_ratio": actual,
        "ttr_ratio": 1.0 - actual,
        "expected_full_attn_ratio": likely,
        "expected_ttr_ratio": 1.0 - likely,
        "actual_full_attn_ratio": actual,
        "actual_ttr_ratio": 1.0 - actual,
        "actual_full_attn_ratio_overall": row["full_attn_overall"],
        "actual_ttr_ratio_overall": row["ttr_overall"],
        "target_full_attn_ratio": target,
        "target_ttr_ratio": 1.0 - target,
        "eligible_ttr_layers": float(eligible.sum()),
        "forced_full_layers": float((~eligible).sum()),
    }
    return row | _sigma_metrics(contexts, 1.0 - ran[:, eligible].mean(dim=1))


def _sigma_metrics(contexts: Sequence[StepContext], by_student: Tensor) -> MetricRow:
    """Where in the schedule students ran; ``by_student`` ``[steps]`` is their share in each step."""
    sigmas = torch.tensor([context.sigma for context in contexts])
    top = float(sigmas.max())
    high, low = sigmas > HIGH_SIGMA * top, sigmas < LOW_SIGMA * top
    row = {
        "sigma": float(sigmas.mean()),
        "sigma_aware_training": 1.0,
        "steps_per_trajectory": float(len(contexts)),
        "height": float(contexts[0].latent_size[0]),
        "width": float(contexts[0].latent_size[1]),
    }
    if bool(high.any()):
        row["ttr_ratio_high_sigma"] = float(by_student[high].mean())
    if bool(low.any()):
        row["ttr_ratio_low_sigma"] = float(by_student[low].mean())
    if bool(high.any()) and bool(low.any()):
        row["ttr_ratio_spread"] = row["ttr_ratio_high_sigma"] - row["ttr_ratio_low_sigma"]
    return row


def reward_metrics(
    rewards: Tensor, advantages: Tensor, errors: Tensor, penalties: Tensor, price: float, baseline: float
) -> MetricRow:
    """Rewards of an update.

    Args:
        rewards: ``[K]``.
        advantages: ``[K]``.
        errors: ``[K]``, errors in the reward's unit.
        penalties: ``[K]``, cost beyond the target before its price.
        price: Price of cost.
        baseline: What rewards were compared with.
    """
    spread = float(rewards.std()) if rewards.shape[0] > 1 else 0.0
    return {
        "reward": float(rewards.mean()),
        "reward_spread": spread,
        "reward_quality": -float(errors.mean()),
        "reward_baseline": baseline,
        "baselined_reward": float(advantages.mean()),
        "efficiency_penalty": float(penalties.mean()),
        "efficiency_penalty_weighted": price * float(penalties.mean()),
        "lambda_eff": price,
    }
