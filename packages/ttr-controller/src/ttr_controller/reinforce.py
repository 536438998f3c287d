"""Policy-gradient arithmetic: pure functions of tensors.

The estimator is REINFORCE (Williams 1992, "Simple statistical gradient-following algorithms") with the leave-one-out
baseline of Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!": K rollouts share prompt
and noise, and each is judged against the mean of the others. The baseline does not depend on the rollout it is
subtracted from, so the estimate is unbiased, and a reward that does not depend on the actions gives no gradient at all.

Layers with one alternative to full attention draw from a Bernoulli distribution, layers with several from a categorical
one; with one alternative of logit 0 both are the same.

Options that are off by default: ``EmaBaseline`` (a running mean with a floor under it, which can hold all advantages at
one sign for long stretches) and ``sigma_weights`` (the result is not the gradient of the expected reward). Left out:
importance ratios and clipping (each rollout is used once, by the policy that acted it), and division of the advantages
by their standard deviation (it makes the step size independent of how much the actions matter).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def bernoulli_log_prob(logits: Tensor, actions: Tensor, eligible: Tensor | None = None) -> Tensor:
    """Log-probability of independent Bernoulli actions, summed over the last axis.

    Args:
        logits: ``[..., L]``, logit of the action 1 (full attention).
        actions: ``[..., L]``, bool or 0/1.
        eligible: ``[L]`` bool; layers that were not free to act count nothing. ``None``: all were.

    Returns:
        ``[...]``; differentiable in ``logits``.

    Raises:
        ValueError: Shapes differ.
    """
    if logits.shape != actions.shape:
        raise ValueError(
            f"logits and actions must have one shape, got {tuple(logits.shape)} and {tuple(actions.shape)}"
        )
    targets = actions.to(logits.dtype)
    log_probs = -functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return _keep_eligible(log_probs, eligible).sum(dim=-1)


def entropy(logits: Tensor, eligible: Tensor | None = None) -> Tensor:
    """Mean entropy in nats of independent Bernoulli choices over the eligible layers.

    Args:
        logits: ``[..., L]``.
        eligible: ``[L]`` bool; ``None``: all layers.

    Returns:
        ``[]``, between 0 and ln 2; differentiable in ``logits``.

    Raises:
        ValueError: No layer is eligible, or the length is wrong.
    """
    # H(p) = softplus(x) - x * sigmoid(x) needs no logarithm of a probability that may round to 0.
    each = functional.softplus(logits) - logits * torch.sigmoid(logits)
    count = each.numel() if eligible is None else each.numel() // each.shape[-1] * int(eligible.sum())
    if count == 0:
        raise ValueError("no layer is eligible: there is no choice to take the entropy of")
    return _keep_eligible(each, eligible).sum() / count


def categorical_log_prob(logits: Tensor, actions: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Log-probability of independent categorical actions, summed over layers.

    Args:
        logits: ``[..., L, A]``.
        actions: ``[..., L]`` int64, numbers of the actions taken.
        allowed: ``[L, A]`` bool, actions among which a layer chose; a layer with one of them counts nothing. ``None``:
            all.

    Returns:
        ``[...]``; differentiable in ``logits``.

    Raises:
        ValueError: Shapes differ.
    """
    if logits.shape[:-1] != actions.shape:
        raise ValueError(f"logits must be [..., L, A] for actions [..., L], got {tuple(logits.shape)}, {actions.shape}")
    log_probs = torch.log_softmax(_keep_allowed(logits, allowed), dim=-1)
    return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(dim=-1)


def categorical_entropy(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Mean entropy in nats of independent categorical choices over the layers that have one.

    Args:
        logits: ``[..., L, A]``.
        allowed: ``[L, A]`` bool; ``None``: all.

    Returns:
        ``[]``, between 0 and ln A; differentiable in ``logits``.

    Raises:
        ValueError: No layer has a choice.
    """
    log_probs = torch.log_softmax(_keep_allowed(logits, allowed), dim=-1)
    each = -(log_probs.exp() * log_probs).sum(dim=-1)
    free = torch.ones_like(each, dtype=torch.bool) if allowed is None else (allowed.sum(dim=-1) > 1).expand(each.shape)
    if not bool(free.any()):
        raise ValueError("no layer is eligible: there is no choice to take the entropy of")
    return torch.where(free, each, 0.0).sum() / free.sum()


@dataclass
class EmaBaseline:
    """Running mean of rewards as a baseline.

    Attributes:
        decay: Share of the old mean kept at each update.
        floor: Rewards below it count as this when the mean is updated.
        value: The mean; 0 before the first reward.
        count: Rewards seen.
    """

    decay: float = 0.95
    floor: float = -0.3
    value: float = 0.0
    count: int = 0

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards ``[K]`` minus the mean of those before; then take the rewards in."""
        advantages = rewards - self.value
        for reward in rewards.tolist():
            kept = max(reward, self.floor)
            self.value = kept if self.count == 0 else self.decay * self.value + (1.0 - self.decay) * kept
            self.count += 1
        return advantages


def sigma_weights(sigmas: Sequence[float]) -> Tensor:
    """Weights ``[steps]`` of log-probabilities that give late steps more: ``1 - sigma / max sigma``, at least 0.1."""
    values = torch.tensor(sigmas, dtype=torch.float32)
    return (1.0 - values / values.max().clamp_min(1e-8)).clamp(0.1, 1.0)


def leave_one_out_advantage(rewards: Tensor) -> Tensor:
    """Reward of each rollout minus the mean reward of the others.

    Args:
        rewards: ``[K]``, rewards of K >= 2 rollouts of the same prompts from the same noise.

    Returns:
        ``[K]``; sums to zero.

    Raises:
        ValueError: Fewer than two rollouts, or not a vector.
    """
    if rewards.ndim != 1 or rewards.shape[0] < 2:
        raise ValueError(f"rewards must be [K] with K >= 2, got shape {tuple(rewards.shape)}")
    count = rewards.shape[0]
    return (rewards - rewards.mean()) * (count / (count - 1))


def policy_loss(log_probs: Tensor, advantages: Tensor, mean_entropy: Tensor, *, entropy_weight: float = 0.0) -> Tensor:
    """Loss whose gradient is the negative policy gradient, minus the entropy bonus.

    Args:
        log_probs: ``[K]``, log-probability of each rollout's actions, with graph.
        advantages: ``[K]``; no gradient flows through them.
        mean_entropy: ``[]``, with graph.
        entropy_weight: Reward per nat of mean entropy.

    Returns:
        ``[]``.

    Raises:
        ValueError: ``log_probs`` and ``advantages`` differ in shape.
    """
    if log_probs.shape != advantages.shape or log_probs.ndim != 1:
        raise ValueError(
            f"log_probs and advantages must both be [K], got {tuple(log_probs.shape)} and {tuple(advantages.shape)}"
        )
    return -(advantages.detach() * log_probs).mean() - entropy_weight * mean_entropy


def _keep_allowed(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Take forbidden actions out of the distribution."""
    if allowed is None:
        return logits
    if allowed.shape != logits.shape[-2:]:
        raise ValueError(f"allowed must be [L, A] = {tuple(logits.shape[-2:])}, got {tuple(allowed.shape)}")
    # Not infinity: its product with a probability of 0 has no gradient.
    return torch.where(allowed, logits, torch.full_like(logits, -1e9))


def _keep_eligible(values: Tensor, eligible: Tensor | None) -> Tensor:
    """Zero the last axis where a layer is not eligible."""
    if eligible is None:
        return values
    if eligible.shape != values.shape[-1:]:
        raise ValueError(f"eligible must be [L] = {tuple(values.shape[-1:])}, got {tuple(eligible.shape)}")
    return torch.where(eligible, values, torch.zeros_like(values))
