"""Guards that let a policy or a fixed schedule decide, per diffusion step and layer, who answers.

A guard answers ``None`` (the student may run) or a sentence saying why full attention runs instead. One mask is decided
per diffusion step of a run, at the first call of that step, and kept for all its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from attn_dispatch.call import AttentionCall, LayerKey, StepContext
from torch import Tensor

from ttr_controller.budget import top_k_mask
from ttr_controller.rollout import LogitsOf, Trajectory, decision_logits, step_key

FULL_BY_POLICY = "the policy chose full attention"
FULL_BY_SCHEDULE = "the schedule has full attention here"
NOT_ELIGIBLE = "the layer's student is not ready"
UNKNOWN_LAYER = "the layer is not one the policy routes"
UNKNOWN_STEP = "the diffusion step is unknown"
NOT_PLANNED = "no mask is planned for this diffusion step"


def threshold_from_quality_speed(quality_speed: float) -> float:
    """Decision threshold of the quality/speed slider: 0 = mostly full attention (0.1), 1 = mostly student (0.9)."""
    return 0.1 + 0.8 * min(1.0, max(0.0, quality_speed))


class PolicyGuard:
    """Lets a policy decide; the same guard serves training and inference.

    Layers that are not eligible are always full, whatever the policy says. ``begin_run`` must be called when a new run
    starts: masks are kept per run, so that an equal step in the next run is drawn anew.

    Args:
        policy: Maps a step to logits ``[L]`` (a ``RoutingPolicy``); high = full attention.
        layers: Layers that the logits belong to, in their order.
        mode: ``"sample"`` draws each layer from its Bernoulli distribution, ``"threshold"`` is full where the
            probability exceeds ``threshold``, ``"table"`` follows ``table``.
        eligible: ``[L]`` bool; ``None``: all layers.
        threshold: Probability of even odds; see ``threshold_from_quality_speed``.
        temperature: Divides the logits' distance from the threshold when sampling.
        generator: Source of the draws, on the CPU; required for ``"sample"``.
        table: For ``"table"``: step to mask ``[L]``, True = full. Steps it lacks are full.

    Raises:
        ValueError: A setting is missing or out of range.
    """

    def __init__(
        self,
        policy: LogitsOf,
        layers: Sequence[LayerKey],
        *,
        mode: Literal["sample", "threshold", "table"] = "threshold",
        eligible: Tensor | None = None,
        threshold: float = 0.5,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        table: Mapping[StepContext, Tensor] | None = None,
    ) -> None:
        if mode not in ("sample", "threshold", "table"):
            raise ValueError(f"mode must be 'sample', 'threshold' or 'table', got {mode!r}")
        if mode == "sample" and generator is None:
            raise ValueError("mode 'sample' needs a torch.Generator; pass torch.Generator().manual_seed(seed)")
        if mode == "table" and table is None:
            raise ValueError("mode 'table' needs a table of masks by diffusion step")
        decision_logits(torch.zeros(1), threshold, temperature)
        self.layers = _unique(layers)
        self._policy = policy
        self._mode = mode
        self._eligible = _eligible_list(eligible, len(self.layers))
        self._threshold = threshold
        self._temperature = temperature
        self._generator = generator
        self._table = {step_key(step): _mask_row(mask, len(self.layers)) for step, mask in (table or {}).items()}
        self._index = {layer: position for position, layer in enumerate(self.layers)}
        self._masks: dict[StepContext, tuple[bool, ...]] = {}

    def __call__(self, call: AttentionCall) -> str | None:
        """Answer ``None`` if the student may run this call, else why full attention runs."""
        position = None if call.layer is None else self._index.get(call.layer)
        if position is None:
            return UNKNOWN_LAYER
        if call.step is None:
            return UNKNOWN_STEP
        step = step_key(call.step)
        mask = self._masks.get(step)
        if mask is None:
            mask = self._decide(step)
            self._masks[step] = mask
        if not self._eligible[position]:
            return NOT_ELIGIBLE
        if not mask[position]:
            return None
        return NOT_PLANNED if self._mode == "table" and step not in self._table else FULL_BY_POLICY

    def begin_run(self) -> None:
        """Forget the masks and the record of the run before."""
        self._masks = {}

    def end_run(self) -> None:
        """Keep the record until the next run starts."""

    @property
    def trajectory(self) -> Trajectory:
        """Steps and actions of the current (or last) run."""
        return Trajectory(tuple(self._masks), tuple(self._masks.values()), self._threshold, self._temperature)

    def _decide(self, step: StepContext) -> tuple[bool, ...]:
        """Choose the mask of a new step; ineligible layers come out full."""
        if self._mode == "table":
            wanted = self._table.get(step, (True,) * len(self.layers))
        else:
            # The one wait for values: a policy on the CPU answers without touching the accelerator's queue.
            with torch.no_grad():
                logits = decision_logits(self._policy(step).float().cpu(), self._threshold, self._temperature)
                wanted = self._choose(logits)
        return tuple(full or not ready for full, ready in zip(wanted, self._eligible, strict=True))

    def _choose(self, logits: Tensor) -> tuple[bool, ...]:
        if logits.shape != (len(self.layers),):
            raise ValueError(f"the policy answers {tuple(logits.shape)} logits for {len(self.layers)} layers")
        if self._mode == "threshold":
            return tuple(logits.gt(0.0).tolist())
        return tuple(torch.bernoulli(torch.sigmoid(logits), generator=self._generator).bool().tolist())


class ScheduleGuard:
    """Follows a fixed mask, step by step in the order in which a run's steps appear.

    Args:
        mask: ``[steps, L]`` bool, True = full. Steps beyond it are full.
        layers: Layers that the columns belong to.

    Raises:
        ValueError: The mask is not bool ``[steps, L]``.
    """

    def __init__(self, mask: Tensor, layers: Sequence[LayerKey]) -> None:
        self.layers = _unique(layers)
        if mask.dtype is not torch.bool or mask.ndim != 2 or mask.shape[1] != len(self.layers):
            raise ValueError(
                f"mask must be bool [steps, {len(self.layers)}], got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        self._rows = [tuple(row) for row in mask.tolist()]
        self._index = {layer: position for position, layer in enumerate(self.layers)}
        self._order: dict[StepContext, int] = {}

    def __call__(self, call: AttentionCall) -> str | None:
        """Answer ``None`` where the mask has the student, else why full attention runs."""
        position = None if call.layer is None else self._index.get(call.layer)
        if position is None:
            return UNKNOWN_LAYER
        if call.step is None:
            return UNKNOWN_STEP
        number = self._order.setdefault(step_key(call.step), len(self._order))
        if number >= len(self._rows):
            return NOT_PLANNED
        return FULL_BY_SCHEDULE if self._rows[number][position] else None

    def begin_run(self) -> None:
        """Start at the first row again."""
        self._order = {}

    def end_run(self) -> None:
        """Nothing is open."""


def masks_from_policy(
    policy: LogitsOf, contexts: Sequence[StepContext], count: int, *, eligible: Tensor | None = None
) -> Tensor:
    """Mask of a whole schedule at an exact count of full slots: the slots of highest logit are full.

    Args:
        policy: Maps a step to logits ``[L]``.
        contexts: The steps that will be sampled, in order.
        count: Full slots among the eligible ones.
        eligible: ``[L]`` bool; ``None``: all layers.

    Returns:
        ``[steps, L]`` bool for ``ScheduleGuard``.

    Raises:
        ValueError: No contexts, or ``count`` does not fit.
    """
    if not contexts:
        raise ValueError("no diffusion step given; record them with ContextRecorder")
    with torch.no_grad():
        logits = torch.stack([policy(context).float().cpu() for context in contexts])
    return top_k_mask(logits, count, eligible=eligible)


def _unique(layers: Sequence[LayerKey]) -> tuple[LayerKey, ...]:
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be given once each, got {[str(layer) for layer in layers]}")
    return tuple(layers)


def _eligible_list(eligible: Tensor | None, layers: int) -> tuple[bool, ...]:
    if eligible is None:
        return (True,) * layers
    return _mask_row(eligible, layers)


def _mask_row(row: Tensor, layers: int) -> tuple[bool, ...]:
    if row.dtype is not torch.bool or row.shape != (layers,):
        raise ValueError(f"expected a bool tensor [{layers}], one entry per layer, got {row.dtype} {tuple(row.shape)}")
    return tuple(row.tolist())
