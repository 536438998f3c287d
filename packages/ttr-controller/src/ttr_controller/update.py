"""One policy-gradient update of a trainer, from the trajectories and errors of its rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from ttr_distill.grad import training_mode

from ttr_controller.budget import full_share
from ttr_controller.reinforce import (
    categorical_entropy,
    entropy,
    leave_one_out_advantage,
    policy_loss,
    sigma_weights,
)
from ttr_controller.reward import cost_penalty, reward
from ttr_controller.rollout import Trajectory, step_log_probs, trajectory_logits
from ttr_controller.step_metrics import MetricRow, reward_metrics, routing_metrics

if TYPE_CHECKING:
    from ttr_controller.trainer import ControllerTrainer


def update_policy(
    trainer: ControllerTrainer, trajectories: Sequence[Trajectory], errors: Sequence[dict[str, float]]
) -> MetricRow:
    """Move the policy along the policy gradient of K rollouts.

    Args:
        trainer: Its policy, optimizer and baseline change.
        trajectories: What each rollout did.
        errors: Error ``"loss"`` of each rollout, and its terms.

    Returns:
        Metrics, averaged over the processes.
    """
    rewards, penalties = _rewards(trainer, trajectories, errors)
    advantages, baseline = _advantages(trainer, rewards)
    allowed = trainer.eligible if trainer.policy.actions == 2 else _allowed(trainer.eligible, trainer.policy.actions)
    config = trainer.config
    with training_mode():
        logits = [trajectory_logits(trainer.policy, trajectory) for trajectory in trajectories]
        log_probs = torch.stack(
            [
                (step_log_probs(x, one, allowed) * _weights(one, config.sigma_weighting)).sum()
                for x, one in zip(logits, trajectories, strict=True)
            ]
        )
        measure = entropy if trainer.policy.actions == 2 else categorical_entropy
        mean_entropy = torch.stack([measure(x, allowed) for x in logits]).mean()
        loss = policy_loss(log_probs, advantages.to(log_probs), mean_entropy, entropy_weight=config.entropy_weight)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [one.grad for one in trainer.policy.parameters() if one.grad is not None]
        trainer.world.mean_(gradients)
        norm = torch.nn.utils.clip_grad_norm_(trainer.policy.parameters(), config.grad_clip_norm)
        trainer.optimizer.step()
    decided = torch.stack([x.detach() for x in logits]).mean(dim=0)
    probabilities = torch.sigmoid(decided) if decided.ndim == 2 else torch.softmax(decided, dim=2)[..., 0]
    scaled = torch.tensor([error["loss"] / trainer.unit for error in errors], dtype=torch.float64)
    row = {name: sum(error[name] for error in errors) / len(errors) for name in errors[0]}
    row |= reward_metrics(rewards, advantages, scaled, penalties, config.reward.lambda_eff, baseline)
    row |= routing_metrics(
        trajectories[0].contexts,
        [one.mask() for one in trajectories],
        probabilities,
        trainer.eligible,
        trainer.target_full,
    )
    row |= {
        "policy_loss": -float((advantages * log_probs.detach()).mean()),
        "reinforce_total_loss": float(loss.detach()),
        "entropy": float(mean_entropy.detach()),
        "entropy_bonus": config.entropy_weight * float(mean_entropy.detach()),
        "lambda_entropy": config.entropy_weight,
        "gumbel_temperature": config.temperature,
        "grad_norm": float(norm),
        "cost": sum(_cost(trainer, one) for one in trajectories) / len(trajectories),
    }
    return _averaged(trainer, row)


def _rewards(
    trainer: ControllerTrainer, trajectories: Sequence[Trajectory], errors: Sequence[dict[str, float]]
) -> tuple[Tensor, Tensor]:
    """Rewards and cost penalties ``[K]``."""
    config = trainer.config.reward
    if config.shape == "ratio":
        costs = [full_share(one.mask(), eligible=trainer.eligible) for one in trajectories]
        target = trainer.target_full
    else:
        costs, target = [_cost(trainer, one) for one in trajectories], trainer.target_cost
    rewards = [
        reward(error["loss"] / trainer.unit, cost, target, config) for error, cost in zip(errors, costs, strict=True)
    ]
    penalties = [cost_penalty(cost, target, config) for cost in costs]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(penalties, dtype=torch.float64)


def _cost(trainer: ControllerTrainer, trajectory: Trajectory) -> float:
    return trainer.costs.total(trajectory.choices(), eligible=trainer.eligible)


def _advantages(trainer: ControllerTrainer, rewards: Tensor) -> tuple[Tensor, float]:
    """Advantages ``[K]``, and what the rewards were compared with."""
    if trainer.config.baseline == "leave_one_out":
        return leave_one_out_advantage(rewards), float(rewards.mean())
    before = trainer.baseline.value
    advantages = trainer.baseline.advantages(rewards)
    if trainer.world.size > 1:
        trainer.baseline.value = sum(trainer.world.gather(trainer.baseline.value)) / trainer.world.size
    return advantages, before


def _weights(trajectory: Trajectory, weighted: bool) -> Tensor | float:
    return sigma_weights([context.sigma for context in trajectory.contexts]) if weighted else 1.0


def _allowed(eligible: Tensor, actions: int) -> Tensor:
    """Allowed attentions ``[L, A]``: full always is."""
    allowed = eligible[:, None].expand(-1, actions).clone()
    allowed[:, 0] = True
    return allowed


def _averaged(trainer: ControllerTrainer, row: MetricRow) -> MetricRow:
    """The row's mean over the processes."""
    if trainer.world.size == 1:
        return row
    rows = trainer.world.gather(row)
    return {name: sum(one[name] for one in rows) / len(rows) for name in row}
