"""Settings of controller learning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ttr_controller.reward import RewardConfig


@dataclass(frozen=True)
class ControllerConfig:
    """Settings of controller learning.

    Attributes:
        target_full: Wanted share of full attention among the eligible slots.
        target_speed_up: Wanted speed-up of attention instead, e.g. 2.0: half of the attention time. It needs costs and
            takes the place of ``target_full``. ``None``: the share counts.
        rollouts: Rollouts K per update.
        learning_rate: Step size of AdamW.
        entropy_weight: Reward per nat of mean entropy; keeps the policy exploring.
        grad_clip_norm: Largest norm of the gradient.
        temperature: Divides the logits when sampling.
        probe_spread: Standard deviation of the logits that ``initialise_from_probe`` fits.
        validate_every: Updates between two comparisons at equal cost.
        checkpoint_every: Updates between two calls of the checkpoint function that ``fit`` is given.
        baseline: ``"leave_one_out"``: mean reward of the other rollouts of the update. ``"ema"``: running mean of
            all rewards before.
        baseline_decay: Share of the old mean kept, with ``"ema"``.
        baseline_floor: Rewards below it count as this in the mean, with ``"ema"``.
        sigma_weighting: Whether late steps get more gradient than early ones; the result is then not the gradient of
            the expected reward.
        reward: How cost enters the reward; errors there are in units of the all-student error, so that a price of 1
            is the mean slope of error against cost.
    """

    target_full: float = 0.5
    target_speed_up: float | None = None
    rollouts: int = 4
    learning_rate: float = 5e-4
    entropy_weight: float = 0.01
    grad_clip_norm: float = 1.0
    temperature: float = 1.0
    probe_spread: float = 2.0
    validate_every: int = 4
    checkpoint_every: int = 10
    baseline: Literal["leave_one_out", "ema"] = "leave_one_out"
    baseline_decay: float = 0.95
    baseline_floor: float = -0.3
    sigma_weighting: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if not 0.0 < self.target_full < 1.0:
            raise ValueError(f"target_full must lie strictly between 0 and 1, got {self.target_full}")
        if self.target_speed_up is not None and self.target_speed_up <= 1.0:
            raise ValueError(f"target_speed_up must be above 1, got {self.target_speed_up}")
        if self.rollouts < (2 if self.baseline == "leave_one_out" else 1):
            raise ValueError(f"rollouts must be >= 2 to compare them with each other, got {self.rollouts}")
        if min(self.validate_every, self.checkpoint_every) < 1:
            raise ValueError(f"validate_every and checkpoint_every must be >= 1, got {self}")
        if min(self.learning_rate, self.grad_clip_norm, self.temperature) <= 0.0:
            raise ValueError(f"learning_rate, grad_clip_norm and temperature must be positive, got {self}")
        if self.entropy_weight < 0.0 or self.probe_spread < 0.0:
            raise ValueError(f"entropy_weight and probe_spread must be >= 0, got {self}")
        if self.baseline not in ("leave_one_out", "ema") or not 0.0 <= self.baseline_decay < 1.0:
            raise ValueError(f"baseline must be 'leave_one_out' or 'ema' and its decay in [0, 1), got {self}")
