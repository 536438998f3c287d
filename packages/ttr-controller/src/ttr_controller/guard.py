"""Guards that let a policy or a fixed schedule decide, per diffusion step and layer, who answers.

A guard answers ``None`` (the attention behind it may run) or a sentence saying why not. One choice is made per
diffusion step of a run, at the first call of that step, and kept for all its layers.

With one alternative to full attention the guard itself stands before it. With several, ``action(number)`` gives the
guard of each; ``routes`` puts them together::

    AttentionRouter(routes(guard, (students, near_far)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from attn_dispatch.call import AttentionCall, LayerKey, StepContext
from attn_dispatch.router import Backend, Guard, Route
from torch import Tensor

from ttr_controller.budget import top_k_mask
from ttr_controller.costs import as_choices
from ttr_controller.inputs import InputSource, Policy, StepInputs, ask
from ttr_controller.rollout import Trajectory, decision_logits, decision_logits_of_many, step_key

FULL_BY_POLICY = "the policy chose full attention"
FULL_BY_SCHEDULE = "the schedule has full attention here"
OTHER_CHOSEN = "another attention was chosen"
NOT_ELIGIBLE = "the layer's student is not ready"
UNKNOWN_LAYER = "the layer is not one the policy routes"
UNKNOWN_STEP = "the diffusion step is unknown"
NOT_PLANNED = "no mask is planned for this diffusion step"

Mode = Literal["sample", "threshold", "table"]
OnStep = Callable[[StepContext, tuple[int, ...]], None]
"""Told once per diffusion step which attention every layer gets: 0 = full."""


def threshold_from_quality_speed(quality_speed: float) -> float:
    """Decision threshold of the quality/speed slider: 0 = mostly full attention (0.1), 1 = mostly student (0.9)."""
    return 0.1 + 0.8 * min(1.0, max(0.0, quality_speed))


class ChoiceGuard:
    """What a policy's and a schedule's guard have in common: one choice per step and layer, number 0 = full.

    Args:
        layers: Layers that choices belong to.
    """

    full_reason = FULL_BY_POLICY

    def __init__(self, layers: Sequence[LayerKey]) -> None:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers must be given once each, got {[str(layer) for layer in layers]}")
        self.layers = tuple(layers)
        self._index = {layer: position for position, layer in enumerate(layers)}

    def __call__(self, call: AttentionCall) -> str | None:
        """Answer ``None`` if the first alternative may run this call, else why not."""
        return self.refusal(call, 1)

    def action(self, number: int) -> ActionGuard:
        """The guard of alternative ``number``, from 1."""
        return ActionGuard(self, number)

    def refusal(self, call: AttentionCall, number: int) -> str | None:
        """Why alternative ``number`` may not run this call; ``None`` if it may."""
        position = None if call.layer is None else self._index.get(call.layer)
        if position is None:
            return UNKNOWN_LAYER
        if call.step is None:
            return UNKNOWN_STEP
        choice = self.choice(step_key(call.step), position)
        if isinstance(choice, str):
            return choice
        if choice == number:
            return None
        return self.full_reason if choice == 0 else OTHER_CHOSEN

    def choice(self, step: StepContext, position: int) -> int | str:
        """Which attention a layer gets in a step, or a reason against all alternatives."""
        raise NotImplementedError

    def begin_run(self) -> None:
        """Forget the choices of the run before."""
        raise NotImplementedError

    def end_run(self) -> None:
        """Keep the record until the next run starts."""


class ActionGuard:
    """Lets one alternative run where it was chosen.

    Args:
        chooser: Who chooses.
        number: Number of the alternative, from 1.

    Raises:
        ValueError: ``number`` is not positive.
    """

    def __init__(self, chooser: ChoiceGuard, number: int) -> None:
        if number < 1:
            raise ValueError(f"alternatives to full attention are numbered from 1, got {number}")
        self._chooser = chooser
        self._number = number

    def __call__(self, call: AttentionCall) -> str | None:
        """Answer ``None`` if this alternative was chosen for the call, else why not."""
        return self._chooser.refusal(call, self._number)

    def begin_run(self) -> None:
        """Tell the chooser; several guards of one chooser tell it several times, before the first call."""
        self._chooser.begin_run()

    def end_run(self) -> None:
        """Tell the chooser."""
        self._chooser.end_run()


def routes(guard: ChoiceGuard, backends: Sequence[Backend], others: Sequence[Guard] = ()) -> tuple[Route, ...]:
    """Routes of a router in which a guard chooses among backends, numbered from 1 in their order.

    Args:
        guard: Who chooses.
        backends: The alternatives to full attention.
        others: Further guards of every route, asked first; readiness for example.
    """
    return tuple(Route(backend, (*others, guard.action(number))) for number, backend in enumerate(backends, start=1))


class PolicyGuard(ChoiceGuard):
    """Lets a policy decide; the same guard serves training and inference.

    Layers that are not eligible are always full, whatever the policy says. ``begin_run`` must be called when a new run
    starts: choices are kept per run, so that an equal step in the next run is drawn anew.

    Args:
        policy: Maps a step to logits ``[L]`` or ``[L, A]`` (a ``RoutingPolicy``); high = full attention.
        layers: Layers that the logits belong to, in their order.
        mode: ``"sample"`` draws each layer from its Bernoulli or categorical distribution, ``"threshold"`` takes the
            likeliest attention after the threshold, ``"table"`` follows ``table``.
        eligible: ``[L]`` bool, or ``[L, A]`` with several alternatives; ``None``: all layers.
        threshold: Probability of even odds; see ``threshold_from_quality_speed``.
        temperature: Divides the logits' distance from the threshold when sampling.
        generator: Source of the draws, on the CPU; ``"sample"`` needs it or ``seed``.
        seed: Draws every run anew from this seed: the same seed, the same choices.
        table: For ``"table"``: step to mask ``[L]``, True = full. Steps it lacks are full.
        inputs: Gives the policy's further inputs; they are recorded with the actions.
        on_step: Told once per step what was chosen.

    Raises:
        ValueError: A setting is missing or out of range.
    """

    def __init__(
        self,
        policy: Policy,
        layers: Sequence[LayerKey],
        *,
        mode: Mode = "threshold",
        eligible: Tensor | None = None,
        threshold: float = 0.5,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        table: Mapping[StepContext, Tensor] | None = None,
        inputs: InputSource | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        super().__init__(layers)
        if mode not in ("sample", "threshold", "table"):
            raise ValueError(f"mode must be 'sample', 'threshold' or 'table', got {mode!r}")
        if mode == "sample" and generator is None and seed is None:
            raise ValueError("mode 'sample' needs a seed or a torch.Generator")
        if mode == "table" and table is None:
            raise ValueError("mode 'table' needs a table of masks by diffusion step")
        decision_logits(torch.zeros(1), threshold, temperature)
        self._policy = policy
        self._mode = mode
        self._allowed, self._eligible = _allowed(eligible, len(self.layers))
        self._threshold = threshold
        self._temperature = temperature
        self._seed = seed
        self._generator = torch.Generator() if generator is None else generator
        rows = {step_key(step): _mask_row(mask, len(self.layers)) for step, mask in (table or {}).items()}
        self._table = {step: tuple(0 if full else 1 for full in row) for step, row in rows.items()}
        self._inputs = inputs
        self._on_step = on_step
        self._forget()

    def choice(self, step: StepContext, position: int) -> int | str:
        """Which attention a layer gets in a step; a new step is decided here."""
        chosen = self._chosen.get(step)
        if chosen is None:
            chosen = self._decide(step)
            self._chosen[step] = chosen
            if self._on_step is not None:
                self._on_step(step, chosen)
        if not self._eligible[position]:
            return NOT_ELIGIBLE
        return NOT_PLANNED if self._mode == "table" and step not in self._table else chosen[position]

    def begin_run(self) -> None:
        """Forget the choices and the record of the run before."""
        self._forget()

    @property
    def trajectory(self) -> Trajectory:
        """Steps and actions of the current (or last) run."""
        return Trajectory(
            tuple(self._chosen),
            tuple(self._chosen.values()),
            tuple(self._seen.values()) if self._inputs is not None else (),
            self._threshold,
            self._temperature,
        )

    def _forget(self) -> None:
        self._chosen: dict[StepContext, tuple[int, ...]] = {}
        self._seen: dict[StepContext, StepInputs] = {}
        if self._seed is not None:
            self._generator.manual_seed(self._seed)

    def _decide(self, step: StepContext) -> tuple[int, ...]:
        """Choose for a new step; ineligible layers come out full."""
        if self._mode == "table":
            wanted = self._table.get(step, (0,) * len(self.layers))
            return tuple(one if ready else 0 for one, ready in zip(wanted, self._eligible, strict=True))
        inputs = None
        if self._inputs is not None:
            inputs = self._seen[step] = self._inputs(step)
        # The one wait for values: a policy on the CPU answers without touching the accelerator's queue.
        with torch.no_grad():
            logits = ask(self._policy, step, inputs).float().cpu()
            if logits.ndim == 2:
                return self._choose_of_many(logits)
            return self._choose(logits)

    def _choose(self, logits: Tensor) -> tuple[int, ...]:
        """One alternative: a coin per layer."""
        if logits.shape != (len(self.layers),):
            raise ValueError(f"the policy answers {tuple(logits.shape)} logits for {len(self.layers)} layers")
        logits = decision_logits(logits, self._threshold, self._temperature)
        if self._mode == "threshold":
            full = logits.gt(0.0).tolist()
        else:
            full = torch.bernoulli(torch.sigmoid(logits), generator=self._generator).bool().tolist()
        return tuple(0 if one or not ready else 1 for one, ready in zip(full, self._eligible, strict=True))

    def _choose_of_many(self, logits: Tensor) -> tuple[int, ...]:
        """Several alternatives: a die per layer."""
        if logits.shape[0] != len(self.layers):
            raise ValueError(f"the policy answers {tuple(logits.shape)} logits for {len(self.layers)} layers")
        logits = decision_logits_of_many(logits, self._threshold, self._temperature)
        allowed = self._allowed if self._allowed.shape[1] == logits.shape[1] else _widen(self._allowed, logits.shape[1])
        logits = torch.where(allowed, logits, -torch.inf)
        if self._mode == "threshold":
            return tuple(logits.argmax(dim=1).tolist())
        draws = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=self._generator)
        return tuple(draws[:, 0].tolist())


class ScheduleGuard(ChoiceGuard):
    """Follows a fixed plan, step by step in the order in which a run's steps appear.

    Args:
        mask: ``[steps, L]``, bool with True = full, or int64 number of the attention. Steps beyond it are full.
        layers: Layers that the columns belong to.

    Raises:
        ValueError: The plan is not ``[steps, L]`` of one of these types.
    """

    full_reason = FULL_BY_SCHEDULE

    def __init__(self, mask: Tensor, layers: Sequence[LayerKey]) -> None:
        super().__init__(layers)
        if mask.dtype not in (torch.bool, torch.int64) or mask.ndim != 2 or mask.shape[1] != len(self.layers):
            raise ValueError(
                f"mask must be bool [steps, {len(self.layers)}] or int64, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        self._rows: list[list[int]] = as_choices(mask).tolist()
        self._order: dict[StepContext, int] = {}

    def choice(self, step: StepContext, position: int) -> int | str:
        """Which attention the plan has for a layer in a step."""
        number = self._order.setdefault(step, len(self._order))
        return NOT_PLANNED if number >= len(self._rows) else self._rows[number][position]

    def begin_run(self) -> None:
        """Start at the first row again."""
        self._order = {}


def masks_from_policy(
    policy: Policy, contexts: Sequence[StepContext], count: int, *, eligible: Tensor | None = None
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
        logits = torch.stack([ask(policy, context, None).float().cpu() for context in contexts])
    return top_k_mask(logits, count, eligible=eligible)


def _allowed(eligible: Tensor | None, layers: int) -> tuple[Tensor, tuple[bool, ...]]:
    """Allowed attentions ``[L, A]`` (full always is) and whether a layer has any choice."""
    if eligible is None:
        eligible = torch.ones(layers, dtype=torch.bool)
    if eligible.ndim == 1:
        row = torch.tensor(_mask_row(eligible, layers))
        return torch.stack([torch.ones_like(row), row], dim=1), tuple(row.tolist())
    if eligible.dtype is not torch.bool or eligible.shape[0] != layers or eligible.ndim != 2:
        raise ValueError(f"eligible must be bool [{layers}] or [{layers}, A], got {tuple(eligible.shape)}")
    allowed = eligible.clone()
    allowed[:, 0] = True
    return allowed, tuple(allowed[:, 1:].any(dim=1).tolist())


def _widen(allowed: Tensor, actions: int) -> Tensor:
    """Give every alternative the permission of the only one."""
    if allowed.shape[1] != 2:
        raise ValueError(f"eligible has {allowed.shape[1]} attentions, the policy {actions}")
    return torch.cat([allowed[:, :1], allowed[:, 1:].expand(-1, actions - 1)], dim=1)


def _mask_row(row: Tensor, layers: int) -> tuple[bool, ...]:
    if row.dtype is not torch.bool or row.shape != (layers,):
        raise ValueError(f"expected a bool tensor [{layers}], one entry per layer, got {row.dtype} {tuple(row.shape)}")
    return tuple(row.tolist())
