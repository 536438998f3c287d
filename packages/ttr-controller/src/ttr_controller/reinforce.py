"""Policy-gradient arithmetic: pure functions of tensors.

The estimator is REINFORCE (Williams 1992, "Simple statistical gradient-following algorithms") with the leave-one-out
baseline of Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!": K rollouts share prompt
and noise, and each is judged against the mean of the others. The baseline does not depend on the rollout it is
subtracted from, so the estimate is unbiased, and a reward that does not depend on the actions gives no gradient at all.

Left out: a running-mean baseline and a floor under it (both can hold all advantages at one sign for long stretches),
weights per noise level on the log-probabilities (the result would not be the gradient of the expected reward),
importance ratios and clipping (each rollout is used once, by the policy that acted it), and division of the advantages
by their standard deviation (it makes the step size independent of how much the actions matter).
"""

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


def _keep_eligible(values: Tensor, eligible: Tensor | None) -> Tensor:
    """Zero the last axis where a layer is not eligible."""
    if eligible is None:
        return values
    if eligible.shape != values.shape[-1:]:
        raise ValueError(f"eligible must be [L] = {tuple(values.shape[-1:])}, got {tuple(eligible.shape)}")
    return torch.where(eligible, values, torch.zeros_like(values))
