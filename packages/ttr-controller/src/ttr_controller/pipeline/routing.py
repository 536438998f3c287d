"""Phase 2 of a run: probe where students hurt, learn where full attention is worth its cost; resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from attn_dispatch import StepContext
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.metrics import open_sinks
from ttr_distill.student import StudentBackend

from ttr_controller.guard import masks_from_policy
from ttr_controller.methods import METHODS
from ttr_controller.pairs import pair_evaluations
from ttr_controller.pipeline.settings import Plan, RunError
from ttr_controller.pipeline.starting import RANKINGS, Start, full_shares, start_training, student_cost, work_of_probes
from ttr_controller.pipeline.workbench import Students, Tick, Workbench
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.relaxed import RelaxedConfig, RelaxedTrainer
from ttr_controller.trainer import ControllerConfig, ControllerTrainer, MetricRow
from ttr_controller.trainer_state import TrainerManifest, TrainerState, unpack_contexts, with_prefix

KIND = "controller"
CURVE_NAME = "controller.jsonl"
SCORES = "probe.scores"
AUTO = "auto"
"""The best of several rankings, judged on training images, refined by REINFORCE as far as the run's budget goes."""
ROLLOUTS = ControllerConfig().rollouts
RANKING = "ranking."
LEARNING = ("relaxed", "reinforce")
"""Methods that go on from a ranking; by default over this many rollouts:"""
DEFAULT_ROLLOUTS = 96
GATE_BATCH = 2
"""Images of a step of relaxed gates."""


@dataclass(frozen=True)
class Learning:
    """How to learn.

    Attributes:
        method: One of ``METHODS``, or ``"auto"``.
        rollouts: Images that refining a ranking, or measuring pairs, may sample; ``None``: the plan's with ``"auto"``,
            else 96. A gradient through an image counts as four.
    """

    method: str = AUTO
    rollouts: int | None = None

    def __post_init__(self) -> None:
        if self.method not in (AUTO, *METHODS):
            raise RunError(f"unknown method {self.method!r}; choose one of {', '.join((AUTO, *METHODS))}")
        if self.rollouts is not None and self.rollouts < 0:
            raise RunError(f"rollouts must be >= 0, got {self.rollouts}")

    def images(self, steps: int, layers: int) -> int | None:
        """Training images to measure on; ``None``: the plan's."""
        if self.method != "pairs":
            return None
        wanted = DEFAULT_ROLLOUTS if self.rollouts is None else self.rollouts
        return max(1, round(wanted * steps / pair_evaluations(steps, layers)))

    def amount(self, plan: Plan) -> int:
        """Rollouts to refine with."""
        if self.method == AUTO:
            return plan.rollouts if self.rollouts is None else self.rollouts
        if self.method not in LEARNING:
            return 0
        return DEFAULT_ROLLOUTS if self.rollouts is None else self.rollouts


@dataclass(frozen=True)
class Routing:
    """What Phase 2 learned.

    Attributes:
        policy: Maps a diffusion step to one logit per layer, high = full attention.
        contexts: The steps of the run's schedule.
        scores: ``[steps, L]``, the probe's score of each slot.
        rankings: Scores ``[steps, L]`` of every method that was measured on the way, by its name.
    """

    policy: RoutingPolicy
    contexts: tuple[StepContext, ...]
    scores: Tensor
    rankings: Mapping[str, Tensor] = field(default_factory=dict)

    def mask(self, count: int) -> Tensor:
        """Mask ``[steps, L]`` with full attention in the ``count`` slots that the policy wants most."""
        return masks_from_policy(self.policy, self.contexts, count)

    def full_probability(self) -> Tensor:
        """Probability of full attention, ``[steps, L]``."""
        with torch.no_grad():
            return torch.sigmoid(self.policy.logits(self.contexts))


def work(plan: Plan, learning: Learning | None = None) -> float:
    """Units of progress: images sampled."""
    how = learning or Learning()
    rankings = RANKINGS if how.method == AUTO else 1
    return work_of_probes(plan) + how.amount(plan) + float(rankings * plan.levels * plan.validation_prompts)


def learn_routing(bench: Workbench, students: Students, tick: Tick, learning: Learning | None = None) -> None:
    """Rank the slots, refine the ranking as the method does, record ``controller``.

    The training is saved after every update, so that an interrupted run goes on there; another method starts anew.
    """
    start = time.perf_counter()
    how = learning or Learning()
    plan = bench.plan()
    trainer, start_at, gates = _start(bench, students, how, tick)
    amount = how.amount(plan)
    with ExitStack() as stack:
        if bench.world.main:
            trainer.sinks = stack.enter_context(open_sinks(bench.run.path / CURVE_NAME, *bench.trackers))
        if how.method == "relaxed":
            _refine_by_gates(bench, students, trainer, start_at, gates, amount, tick)
        else:
            size = bench.world.size
            updates = amount // (trainer.config.rollouts * size)
            for _ in trainer.fit(*bench.train_set(max(8, size)), updates, should_stop=_ticking(tick)):
                _save(bench, trainer, start_at, how)
    trainer.validate()
    _save(bench, trainer, start_at, how)
    made = amount if how.method == "relaxed" else trainer.rollouts
    if bench.world.main:
        _record(bench, trainer, start_at, how, made, student_cost(bench, students), time.perf_counter() - start)


def _refine_by_gates(
    bench: Workbench,
    students: Students,
    trainer: ControllerTrainer,
    start_at: Start,
    saved: dict[str, Tensor],
    amount: int,
    tick: Tick,
) -> None:
    """Refine the policy's ranking by relaxed gates; the better of both on the validation images stays."""
    with torch.no_grad():
        ranking = trainer.policy.logits(trainer.contexts)
    shares = full_shares(student_cost(bench, students), bench.plan().levels)
    batch, size = GATE_BATCH, bench.world.size
    gates = RelaxedTrainer(
        bench.sampler,
        StudentBackend(students.bank),
        ranking,
        RelaxedConfig(iterations=max(1, amount // (4 * batch * size)), shares=shares, batch=batch),
        seed=bench.run.settings.seed,
        sinks=trainer.sinks,
        world=bench.world,
    )
    how = Learning("relaxed", amount)
    if saved:
        gates.load_state_dict(saved)
    pool = max(12, batch * size)
    prompts, seeds = bench.train_set(4 + pool)
    for _ in gates.fit(prompts[-pool:], seeds[-pool:]):
        _save(bench, trainer, start_at, how, gates.state_dict())
        tick(4.0 * batch * size)
    trainer.initialise_from_probe(gates.scores)


def load_routing(bench: Workbench) -> Routing:
    """Load what Phase 2 left in the run.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another teacher.
    """
    loaded = _load_state(bench, None)
    if loaded is None:
        raise CheckpointError(f"no controller in {bench.run.controller}; run: ttr train-controller {bench.run.path}")
    state, start_at, _ = loaded
    policy = _new_policy(bench)
    policy.load_state_dict(with_prefix(state["tensors"], "best."))
    rankings = start_at.rankings or {"probe": start_at.scores}
    return Routing(policy, unpack_contexts(state["manifest"]["contexts"]), start_at.scores, rankings)


def _start(
    bench: Workbench, students: Students, how: Learning, tick: Tick
) -> tuple[ControllerTrainer, Start, dict[str, Tensor]]:
    """Go on with the run's training, or begin it with a ranking; the third is the state of relaxed gates, if any."""
    cost = student_cost(bench, students)
    backend = StudentBackend(students.bank)
    trainer = ControllerTrainer(
        bench.sampler,
        backend,
        _new_policy(bench),
        ControllerConfig(target_full=full_shares(cost, 1)[0]),
        seed=bench.run.settings.seed,
        student_cost=torch.full((len(bench.sampler.layers),), cost),
        world=bench.world,
    )
    loaded = _load_state(bench, how)
    bench.world.wait()  # all have read the state before the main process writes the next
    if loaded is not None:
        trainer.load_state_dict(loaded[0])
        return trainer, loaded[1], loaded[2]
    if bench.world.main:
        (bench.run.path / CURVE_NAME).unlink(missing_ok=True)
    images = how.images(bench.sampler.steps, len(bench.sampler.layers))
    start_at = start_training(bench, trainer, backend, cost, how.method, tick, images)
    _save(bench, trainer, start_at, how)
    return trainer, start_at, {}


def _new_policy(bench: Workbench) -> RoutingPolicy:
    """A fresh policy for the sampler's layers; one latent pixel of the tiny teacher is a token of 4 x 4 pixels."""
    config = PolicyConfig(pixels_per_latent=4.0)
    return RoutingPolicy(len(bench.sampler.layers), config, seed=bench.run.settings.seed)


def _ticking(tick: Tick) -> Callable[[], bool]:
    """Move the progress bar before each rollout; never ask to stop."""

    def before_rollout() -> bool:
        tick(1.0)
        return False

    return before_rollout


def _save(
    bench: Workbench,
    trainer: ControllerTrainer,
    start_at: Start,
    how: Learning,
    gates: Mapping[str, Tensor] | None = None,
) -> None:
    if not bench.world.main:
        return
    state = trainer.state_dict()
    rankings = {RANKING + name: scores for name, scores in start_at.rankings.items()}
    tensors = {**state["tensors"], SCORES: start_at.scores, **rankings, **(gates or {})}
    manifest = {
        "kind": KIND,
        "method": how.method,
        "start": start_at.chosen,
        "start_errors": start_at.errors,
        "start_rollouts": start_at.rollouts,
        "start_curve": [list(point) for point in start_at.curve],
        **state["manifest"],
    }
    save_checkpoint(bench.run.controller, tensors, manifest, fingerprint=bench.teacher.fingerprint)


def _load_state(bench: Workbench, how: Learning | None) -> tuple[TrainerState, Start, dict[str, Tensor]] | None:
    """Read the run's controller checkpoint; ``None`` if there is none yet, or it is of another method."""
    if not bench.run.controller.exists():
        return None
    saved = load_checkpoint(bench.run.controller, fingerprint=bench.teacher.fingerprint)
    tensors, manifest = dict(saved.tensors), saved.manifest
    errors = manifest.get("start_errors")
    if manifest.get("kind") != KIND or SCORES not in tensors or not isinstance(errors, dict):
        raise CheckpointError(f"checkpoint {bench.run.controller} holds no controller")
    if how is not None and manifest.get("method", AUTO) != how.method:
        return None
    rankings = with_prefix(tensors, RANKING)
    for name in rankings:
        del tensors[RANKING + name]
    # A run of an earlier version has neither.
    rollouts = float(cast("float", manifest.get("start_rollouts", 0.0)))
    points = cast("list[list[float]]", manifest.get("start_curve", []))
    curve = tuple((made, error) for made, error in points)
    start_at = Start(tensors.pop(SCORES), str(manifest["start"]), errors, rankings, rollouts, curve)
    gates = {name: tensors.pop(name) for name in list(tensors) if name.startswith("gates.")}
    return {"tensors": tensors, "manifest": cast(TrainerManifest, manifest)}, start_at, gates


def learning_curve(
    start_at: Start, rows: Mapping[int, MetricRow], rollouts: float, cost: float, last_error: float | None = None
) -> list[dict[str, float | int | None]]:
    """Points of the report's learning curve: what was there before, the ranking, and one for each update.

    Args:
        start_at: Where learning started.
        rows: Metric row of each update, by its number from 1.
        rollouts: Images that an update samples.
        cost: Of the students relative to full attention.
        last_error: Validation error at the end, where updates are not validated one by one.
    """
    curve: list[dict[str, float | int | None]] = [
        {"rollouts": round(made), "validation": error} for made, error in start_at.curve
    ]
    for step, row in sorted(rows.items()):
        share = row.get("actual_full_attn_ratio", row.get("target_full_attn_ratio", row.get("share", 0.0)))
        curve.append(
            {
                "rollouts": round(start_at.rollouts + step * rollouts),
                "reward": row.get("reward"),
                "quality": row["loss"],
                "cost": cost + (1.0 - cost) * share,
                "validation": row.get("best_error"),
            }
        )
    if last_error is not None and rows:
        curve[-1]["validation"] = last_error
    return curve


def _record(
    bench: Workbench,
    trainer: ControllerTrainer,
    start_at: Start,
    how: Learning,
    made: int,
    cost: float,
    seconds: float,
) -> None:
    """Write the section ``controller``: the learning curve and the routing heat map."""
    lines = (bench.run.path / CURVE_NAME).read_text(encoding="utf-8").splitlines()
    rows: dict[int, MetricRow] = {}
    for row in map(json.loads, lines):
        rows[int(row["step"])] = row  # an update that was done twice, around an interruption, counts once
    if how.method == "relaxed":
        curve = learning_curve(start_at, rows, 4.0 * GATE_BATCH * bench.world.size, cost, trainer.best.error)
    else:
        done = {step: row for step, row in rows.items() if step <= trainer.updates}
        curve = learning_curve(start_at, done, float(trainer.config.rollouts * bench.world.size), cost)
    routing = Routing(trainer.best_policy(), trainer.contexts, torch.empty(0))
    heatmap = {
        "layers": [str(layer) for layer in bench.sampler.layers],
        "sigmas": [context.sigma for context in routing.contexts],
        "full_probability": routing.full_probability().tolist(),
    }
    start = start_at.chosen
    name = f"{start}, then leave-one-out REINFORCE" if trainer.updates else start
    section: dict[str, object] = {
        "method": f"{start}, then relaxed gates" if how.method == "relaxed" else name,
        "learner": how.method,
        "start": {"chosen": start, "validation_errors": start_at.errors},
        "rollouts": made,
        "target_full": trainer.config.target_full,
        "curve": curve,
        "heatmap": heatmap,
    }
    bench.run.record("controller", section, seconds)
