"""Reward of one rollout: image error and attention cost in one number.

``reward = -error - lambda_eff * penalty(cost - target)``. The trainer keeps the *expected* share of full attention at
the target itself (it shifts all logits by one constant after each update), so the penalty does not have to hold the
budget. What is left to it is variance: a rollout that happened to draw more full attention has a smaller error, and
without a price that luck would be credited to the slots it drew. A linear price removes it to first order when
``lambda_eff`` is near the slope of error against cost; a one-sided penalty is what to use when the budget is only an
upper limit. The third shape punishes any distance of the share of full attention from its target, also where more was
saved than asked.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RewardConfig:
    """How cost enters the reward.

    Attributes:
        lambda_eff: Price of relative cost in units of error: the error that saving all attention would be worth.
        shape: ``"linear"``: cost below the target is rewarded as much as cost above is punished. ``"one_sided"``: cost
            above the target is punished, below it only ``pull`` of the price is charged per unit of distance.
            ``"ratio"``: the distance of the share of full attention from its target is punished on both sides; cost and
            target are then shares.
        pull: Share of the price charged below the target with ``"one_sided"``; keeps the budget used.
    """

    lambda_eff: float = 1.0
    shape: Literal["linear", "one_sided", "ratio"] = "linear"
    pull: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lambda_eff) and self.lambda_eff >= 0.0):
            raise ValueError(f"lambda_eff must be finite and >= 0, got {self.lambda_eff}")
        if self.shape not in ("linear", "one_sided", "ratio"):
            raise ValueError(f"shape must be 'linear', 'one_sided' or 'ratio', got {self.shape!r}")
        if not 0.0 <= self.pull <= 1.0:
            raise ValueError(f"pull must lie between 0 and 1, got {self.pull}")


def cost_penalty(cost: float, target: float, config: RewardConfig) -> float:
    """Penalty of a relative cost against its target, before the price.

    Args:
        cost: Attention time, measured or modelled, relative to full attention in all eligible slots; with ``"ratio"``
            the share of full attention.
        target: The wanted value of the same number.
        config: Shape of the penalty.
    """
    excess = cost - target
    if config.shape == "ratio":
        return abs(excess)
    if config.shape == "linear" or excess >= 0.0:
        return excess
    return -config.pull * excess


def reward(error: float, cost: float, target: float, config: RewardConfig) -> float:
    """Reward of one rollout; higher is better.

    Args:
        error: Distance of the rollout's images from the teacher's, 0 = equal.
        cost: Relative attention cost; see ``cost_penalty``.
        target: Its wanted value.
        config: Price and shape of the cost.

    Raises:
        ValueError: The error is not finite.
    """
    if not math.isfinite(error):
        raise ValueError(f"the error of a rollout must be finite, got {error}; the student's output is broken")
    return -error - config.lambda_eff * cost_penalty(cost, target, config)
