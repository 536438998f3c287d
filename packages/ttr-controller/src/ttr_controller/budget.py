"""Masks at an exact count of full-attention slots, and what a mask costs.

A slot is one layer in one diffusion step. A mask is ``[steps, L]`` bool, True = full attention. Two schedules are
compared fairly only at equal cost, so every baseline here takes the same ``count`` of full slots and meets it exactly.
Layers that are not eligible (their student is not ready) are full in every mask and never counted.
"""

import torch
from torch import Tensor


def slot_count(steps: int, eligible: Tensor, share: float) -> int:
    """Number of full slots that is nearest to a share of all eligible slots.

    Args:
        steps: Number of diffusion steps.
        eligible: ``[L]`` bool.
        share: Wanted share of full attention, 0 to 1.

    Raises:
        ValueError: The share is outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share of full attention must lie between 0 and 1, got {share}")
    return round(share * steps * int(eligible.sum()))


def all_full(steps: int, layers: int) -> Tensor:
    """Mask of exact attention everywhere, ``[steps, layers]``."""
    return torch.ones(steps, layers, dtype=torch.bool)


def all_student(steps: int, layers: int, *, eligible: Tensor | None = None) -> Tensor:
    """Mask of students wherever one is eligible, ``[steps, layers]``."""
    return _spread(torch.zeros(steps, layers, dtype=torch.bool), eligible)


def random_mask(
    steps: int, layers: int, count: int, generator: torch.Generator, *, eligible: Tensor | None = None
) -> Tensor:
    """Mask with ``count`` full slots drawn without replacement, ``[steps, layers]``.

    Args:
        steps: Number of diffusion steps.
        layers: Number of layers.
        count: Full slots among the eligible ones.
        generator: Source of the draw.
        eligible: ``[layers]`` bool; ``None``: all.

    Raises:
        ValueError: ``count`` does not fit.
    """
    return top_k_mask(torch.rand(steps, layers, generator=generator), count, eligible=eligible)


def first_steps_full(steps: int, layers: int, count: int, *, eligible: Tensor | None = None) -> Tensor:
    """Mask whose first ``count`` eligible slots in running order are full, ``[steps, layers]``."""
    order = torch.arange(steps * layers, 0, -1, dtype=torch.float32).view(steps, layers)
    return top_k_mask(order, count, eligible=eligible)


def last_steps_full(steps: int, layers: int, count: int, *, eligible: Tensor | None = None) -> Tensor:
    """Mask whose last ``count`` eligible slots in running order are full, ``[steps, layers]``."""
    order = torch.arange(steps * layers, dtype=torch.float32).view(steps, layers)
    return top_k_mask(order, count, eligible=eligible)


def top_k_mask(scores: Tensor, count: int, *, eligible: Tensor | None = None) -> Tensor:
    """Mask with full attention in the ``count`` eligible slots of highest score.

    Equal scores are decided by running order (the earlier slot wins), so the count is always exact.

    Args:
        scores: ``[steps, L]``; high = needs full attention.
        count: Full slots among the eligible ones.
        eligible: ``[L]`` bool; ``None``: all.

    Returns:
        ``[steps, L]`` bool.

    Raises:
        ValueError: ``scores`` is not a matrix, is not finite, or ``count`` does not fit.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [steps, L], got shape {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or infinity; a ranking needs finite scores")
    allowed = _eligible_slots(scores, eligible)
    slots = torch.nonzero(allowed.flatten()).squeeze(1)
    if not 0 <= count <= slots.numel():
        raise ValueError(f"count must lie between 0 and the {slots.numel()} eligible slots, got {count}")
    order = torch.sort(scores.flatten()[slots], descending=True, stable=True).indices
    mask = ~allowed.flatten()
    mask[slots[order[:count]]] = True
    return mask.view(scores.shape)


def full_share(mask: Tensor, *, eligible: Tensor | None = None) -> float:
    """Share of the eligible slots of a mask ``[steps, L]`` that are full.

    Raises:
        ValueError: There is no eligible slot.
    """
    allowed = _eligible_slots(mask, eligible)
    total = int(allowed.sum())
    if total == 0:
        raise ValueError("no layer is eligible: the share of full attention is undefined")
    return int((mask & allowed).sum()) / total


def relative_cost(mask: Tensor, student_cost: Tensor, *, eligible: Tensor | None = None) -> float:
    """Modelled attention cost of the eligible slots relative to full attention in all of them.

    Full attention is taken to cost the same in every layer.

    Args:
        mask: ``[steps, L]`` bool, True = full.
        student_cost: ``[L]``, cost of a layer's student relative to its full attention.
        eligible: ``[L]`` bool; ``None``: all.

    Returns:
        1.0 for an all-full mask, the mean of ``student_cost`` over eligible layers for an all-student one.

    Raises:
        ValueError: Shapes differ, or there is no eligible slot.
    """
    allowed = _eligible_slots(mask, eligible)
    if student_cost.shape != mask.shape[1:]:
        raise ValueError(f"student_cost must be [L] = {tuple(mask.shape[1:])}, got {tuple(student_cost.shape)}")
    total = int(allowed.sum())
    if total == 0:
        raise ValueError("no layer is eligible: the relative cost is undefined")
    each = torch.where(mask, 1.0, student_cost.double().expand(mask.shape))
    return float(each[allowed].sum()) / total


def logits_for_scores(scores: Tensor, *, spread: float, eligible: Tensor | None = None) -> Tensor:
    """Logits with the ranking of the scores: normal quantiles of the ranks, whatever the scores' distribution.

    Args:
        scores: ``[steps, L]``; high = needs full attention.
        spread: Standard deviation of the logits over eligible slots; the larger, the surer the policy.
        eligible: ``[L]`` bool; other slots get 0. ``None``: all.

    Returns:
        ``[steps, L]`` float32 with mean 0 over eligible slots.

    Raises:
        ValueError: ``spread`` is negative, or there is no eligible slot.
    """
    allowed = _eligible_slots(scores, eligible).flatten()
    count = int(allowed.sum())
    if spread < 0.0 or count == 0:
        raise ValueError(f"spread must be >= 0 and a layer eligible, got spread {spread} and {count} slots")
    ranks = torch.empty(count)
    ranks[torch.sort(scores.flatten()[allowed], stable=True).indices] = (torch.arange(count) + 0.5) / count
    logits = torch.zeros(allowed.shape[0])
    logits[allowed] = spread * torch.special.ndtri(ranks)
    return logits.view(scores.shape)


def shift_to_share(logits: Tensor, share: float, *, eligible: Tensor | None = None) -> float:
    """Constant to add to all logits so that the expected share of full attention is the wanted one.

    Args:
        logits: ``[steps, L]``.
        share: Wanted mean of ``sigmoid(logits + constant)`` over eligible slots; kept within 0.1 % of 0 and 1.
        eligible: ``[L]`` bool; ``None``: all.
    """
    chosen = logits.double()[_eligible_slots(logits, eligible)]
    wanted = min(0.999, max(0.001, share))
    low, high = -50.0 - float(chosen.max()), 50.0 - float(chosen.min())
    for _ in range(50):
        middle = (low + high) / 2
        if float(torch.sigmoid(chosen + middle).mean()) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def tilt_to_cost(logits: Tensor, costs: Tensor, target: float, *, eligible: Tensor | None = None) -> Tensor:
    """What to add to the logits of every step so that the expected relative cost is the wanted one.

    Every attention's logit is moved in proportion to its cost in the layer: the dearer ones gain, or lose, together.

    Args:
        logits: ``[steps, L]``, or ``[steps, L, A]`` with several alternatives.
        costs: ``[L, A]``, full attention at index 0.
        target: Wanted expected cost relative to full attention in all eligible slots; kept within what is possible.
        eligible: ``[L]`` bool; ``None``: all.

    Returns:
        ``[L, A]`` float32; the last alternative's column is 0.
    """
    wide = torch.stack([logits, torch.zeros_like(logits)], dim=2) if logits.ndim == 2 else logits
    keep = torch.ones(wide.shape[1], dtype=torch.bool) if eligible is None else eligible
    prices = costs.double() / costs[keep, 0].double().mean()
    slopes = prices - prices[:, -1:]
    chosen, whole = wide.double()[:, keep], float(prices[keep, 0].sum()) * wide.shape[0]
    low, high = -200.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        spent = torch.softmax(chosen + middle * slopes[keep], dim=2) * prices[keep]
        if float(spent.sum()) < target * whole:
            low = middle
        else:
            high = middle
    return ((low + high) / 2 * slopes).float()


def _eligible_slots(like: Tensor, eligible: Tensor | None) -> Tensor:
    """Expand ``[L]`` eligibility to the slots ``[steps, L]``."""
    if eligible is None:
        return torch.ones(like.shape, dtype=torch.bool)
    if eligible.dtype is not torch.bool or eligible.shape != like.shape[1:]:
        raise ValueError(
            f"eligible must be bool [L] = {tuple(like.shape[1:])}, got {eligible.dtype} {tuple(eligible.shape)}"
        )
    return eligible.expand(like.shape)


def _spread(mask: Tensor, eligible: Tensor | None) -> Tensor:
    """Set the slots of ineligible layers to full."""
    return mask | ~_eligible_slots(mask, eligible)
