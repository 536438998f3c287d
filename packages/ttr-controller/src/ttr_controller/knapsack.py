"""The best choice of an attention per slot when errors add up: a knapsack, solved by dynamic programming.

Every (step, layer) slot takes one of A attentions, number 0 the full one. Each has a measured error and a cost in
milliseconds (or any other unit). Errors of slots add up nearly as squares, so the sum of squared errors is minimised
under a limit on the summed cost: a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, "Knapsack problems",
chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESOLUTION = 4096
"""Parts into which the cost limit is cut; a slot's cost is rounded to the nearest."""
TOLERANCE = 1e-6
"""By how much of the limit a plan may exceed it: costs often come in single precision."""


def knapsack_choices(errors: Tensor, costs: Tensor, limit: float, *, resolution: int = RESOLUTION) -> Tensor:
    """Choose an attention for every slot so that the sum of squared errors is least within a cost limit.

    Args:
        errors: ``[steps, L, A]``, error of each attention in each slot; ``inf`` = not allowed there.
        costs: ``[L, A]`` or ``[steps, L, A]``, non-negative; full attention stands at index 0.
        limit: Largest summed cost, in the unit of ``costs``.
        resolution: Parts into which the limit is cut. Costs are rounded to the nearest part; the answer keeps the limit
            in true costs.

    Returns:
        ``[steps, L]`` int64, number of the attention of each slot.

    Raises:
        ValueError: Shapes differ, a value is negative or NaN, or not even the cheapest choices fit the limit.
    """
    costs = _checked(errors, costs)
    steps, layers, count = errors.shape
    squared = errors.double().reshape(-1, count).square()
    price = torch.where(squared.isfinite(), costs.double().reshape(-1, count), torch.inf)
    cheapest = price.amin(dim=1)
    spare = limit - float(cheapest.sum())
    slack = TOLERANCE * max(abs(limit), float(cheapest.sum()))
    if not spare >= -slack:
        raise ValueError(
            f"the cheapest choices cost {float(cheapest.sum()):.6g}, more than the limit of {limit:.6g}; raise it"
        )
    if spare <= slack:
        return price.argmin(dim=1).view(steps, layers)
    # Only what a choice costs beyond the cheapest one of its slot has to fit; what exceeds the limit never does.
    extra = price - cheapest[:, None]
    parts = torch.where(extra <= spare + slack, extra / spare * resolution, torch.inf).round()
    capacity = resolution + (parts.shape[0] + 1) // 2
    chosen = _fill(squared, parts, capacity)
    for start in range(capacity, -1, -1):
        choices = _walk_back(chosen, parts, start)
        total = float(extra.gather(1, choices[:, None]).sum())
        if total <= spare + slack:
            return choices.view(steps, layers)
    raise AssertionError("the cheapest choices fit")


def choices_from_logits(logits: Tensor, costs: Tensor, limit: float) -> Tensor:
    """The likeliest choice of an attention for every slot within a cost limit.

    Args:
        logits: ``[steps, L, A]``, or ``[steps, L]`` of full attention against one alternative; ``-inf`` = not allowed.
        costs: ``[L, A]``, full attention at index 0.
        limit: Largest cost relative to full attention in all slots.

    Returns:
        ``[steps, L]`` int64.
    """
    if logits.ndim == 2:
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=2)
    # What a choice gives up against the likeliest one adds up over slots; the knapsack squares its errors.
    regret = (logits.amax(dim=2, keepdim=True) - logits).double().clamp_min(0.0)
    return knapsack_choices(regret.sqrt(), costs, limit * float(costs[:, 0].sum()) * logits.shape[0])


def knapsack_scores(errors: Tensor, costs: Tensor, *, limits: int = 24) -> Tensor:
    """Rank slots of one student by the knapsacks at cost limits from all student to all full.

    Args:
        errors: ``[steps, L]``, error of the student in each slot.
        costs: ``[L, 2]`` or ``[steps, L, 2]``, of full attention and of the student.
        limits: Number of limits, evenly spaced.

    Returns:
        ``[steps, L]``, high = needs full attention: at how many of the limits the best plan has it; slots that are
        alike in that stand in the order of squared error for each unit of cost that the student saves.

    Raises:
        ValueError: Shapes differ, or a value is negative or NaN.
    """
    pairs = torch.stack([torch.zeros_like(errors), errors], dim=2)
    priced = _checked(pairs, costs).double()
    low, high = float(priced.amin(dim=2).sum()), float(priced[..., 0].sum())
    worth = errors.double().square() / (priced[..., 0] - priced[..., 1]).clamp_min(1e-12)
    order = (worth.flatten()[:, None] > worth.flatten()).sum(dim=1).view_as(worth)
    scores = order / (order.numel() * 1.0)
    for part in range(1, limits + 1):
        scores += knapsack_choices(pairs, costs, low + (high - low) * part / (limits + 1)) == 0
    return scores.float()


def layer_threshold_scores(layer_errors: Tensor, steps: int) -> Tensor:
    """Scores ``[steps, L]`` that keep the layers of largest distillation error full, in every step.

    ``top_k_mask`` of them is the threshold that meets a count exactly; what is left over goes to the first steps of the
    next layer.

    Args:
        layer_errors: ``[L]``.
        steps: Number of diffusion steps.
    """
    if layer_errors.ndim != 1 or steps < 1:
        raise ValueError(f"layer_errors must be [L] and steps >= 1, got {tuple(layer_errors.shape)}, {steps}")
    return layer_errors.float().expand(steps, -1).clone()


def bucket_errors(sigmas: Sequence[float], measured_sigmas: Sequence[float], measured: Tensor, buckets: int) -> Tensor:
    """Spread errors measured at some noise levels over the steps of a schedule, by buckets of sigma.

    Args:
        sigmas: Noise level of each step of the schedule.
        measured_sigmas: Noise levels that errors were measured at.
        measured: ``[len(measured_sigmas), L]``.
        buckets: Equal ranges of sigma over both lists; measured errors of a bucket are joined by root mean square, an
            empty bucket takes the nearest level's.

    Returns:
        ``[len(sigmas), L]``.

    Raises:
        ValueError: Lists are empty or ``measured`` does not fit them.
    """
    if not sigmas or measured.ndim != 2 or measured.shape[0] != len(measured_sigmas) or not measured_sigmas:
        raise ValueError(f"measured must be [{len(measured_sigmas)}, L] and sigmas given, got {tuple(measured.shape)}")
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    low, high = min(*sigmas, *measured_sigmas), max(*sigmas, *measured_sigmas)
    width = max(high - low, 1e-12) / buckets

    def bucket(sigma: float) -> int:
        return min(buckets - 1, int((sigma - low) / width))

    rows = []
    for sigma in sigmas:
        inside = [i for i, other in enumerate(measured_sigmas) if bucket(other) == bucket(sigma)]
        nearest = min(range(len(measured_sigmas)), key=lambda i: abs(measured_sigmas[i] - sigma))
        rows.append(measured[inside or [nearest]].square().mean(dim=0).sqrt())
    return torch.stack(rows)


def _checked(errors: Tensor, costs: Tensor) -> Tensor:
    """Costs as ``[steps, L, A]``."""
    if errors.ndim != 3 or costs.shape not in (errors.shape, errors.shape[1:]):
        raise ValueError(
            f"errors must be [steps, L, A] and costs the same or [L, A], got {tuple(errors.shape)} "
            f"and {tuple(costs.shape)}"
        )
    if not bool((errors >= 0).all()) or not bool(((costs >= 0) & costs.isfinite()).all()):
        raise ValueError("errors and costs must be non-negative and costs finite")
    return costs.expand(errors.shape)


def _fill(squared: Tensor, parts: Tensor, capacity: int) -> Tensor:
    """Best choice of each slot at each capacity, ``[slots, capacity + 1]`` int64."""
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    chosen = torch.zeros(parts.shape[0], capacity + 1, dtype=torch.int64)
    for slot in range(parts.shape[0]):
        options = torch.full((parts.shape[1], capacity + 1), torch.inf, dtype=torch.float64)
        for number, (part, error) in enumerate(zip(parts[slot].tolist(), squared[slot].tolist(), strict=True)):
            if part <= capacity:
                options[number, int(part) :] = best[: capacity + 1 - int(part)] + error
        best, chosen[slot] = options.min(dim=0)
    return chosen


def _walk_back(chosen: Tensor, parts: Tensor, capacity: int) -> Tensor:
    """Choices ``[slots]`` of the solution that a capacity leads to."""
    picks = []
    for slot in range(chosen.shape[0] - 1, -1, -1):
        pick = int(chosen[slot, capacity])
        picks.append(pick)
        capacity -= int(parts[slot, pick])
    return torch.tensor(picks[::-1])
