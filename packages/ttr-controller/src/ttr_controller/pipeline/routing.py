"""Phase 2 of a run: probe where students hurt, learn where full attention is worth its cost; resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from attn_dispatch import StepContext, TokenLayout
from attn_kernels import TokenGrid
from attn_kernels.cost import exact_flops
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.metrics import JsonlSink
from ttr_distill.student import StudentBackend

from ttr_controller.budget import slot_count
from ttr_controller.guard import masks_from_policy
from ttr_controller.pipeline.settings import Plan
from ttr_controller.pipeline.workbench import Students, Tick, Workbench
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.probe import flip_evaluations, flip_scores, velocity_error_probe
from ttr_controller.trainer import BestPolicy, ControllerConfig, ControllerTrainer, MetricRow
from ttr_controller.trainer_state import TrainerManifest, TrainerState, unpack_contexts, with_prefix

KIND = "controller"
CURVE_NAME = "controller.jsonl"
SCORES = "probe.scores"
COSTS = (0.5, 2 / 3, 5 / 6)
"""Relative attention costs that are compared; the policy is trained at the first."""
FULL_SHARES = (0.5, 0.25, 0.75)
"""Shares of full attention compared where the student is too dear for the lowest cost."""
COST_MARGIN = 0.05
"""A student must be this much cheaper than a cost for the cost to leave it anything to do."""
ROLLOUTS = ControllerConfig().rollouts
RANKINGS = 4
"""Rankings of the slots that the policy may start from."""


@dataclass(frozen=True)
class Routing:
    """What Phase 2 learned.

    Attributes:
        policy: Maps a diffusion step to one logit per layer, high = full attention.
        contexts: The steps of the run's schedule.
        scores: ``[steps, L]``, the probe's score of each slot.
    """

    policy: RoutingPolicy
    contexts: tuple[StepContext, ...]
    scores: Tensor

    def mask(self, count: int) -> Tensor:
        """Mask ``[steps, L]`` with full attention in the ``count`` slots that the policy wants most."""
        return masks_from_policy(self.policy, self.contexts, count)

    def full_probability(self) -> Tensor:
        """Probability of full attention, ``[steps, L]``."""
        with torch.no_grad():
            return torch.sigmoid(self.policy.logits(self.contexts))


@dataclass(frozen=True)
class Start:
    """Where learning starts.

    Attributes:
        scores: ``[steps, L]``, the one-step probe's score of each slot.
        chosen: Name of the ranking that the policy was given.
        errors: Error of each ranking on training prompts that it was not made from, geometric mean over the costs
            that the run compares.
    """

    scores: Tensor
    chosen: str
    errors: dict[str, float]


def student_cost(bench: Workbench, students: Students) -> float:
    """Operations of the students relative to exact attention at the run's size, mean over the layers."""
    settings, sampler = bench.run.settings, bench.sampler
    grid = TokenGrid(sampler.text_tokens, settings.rows, settings.columns)
    layout = TokenLayout(grid.stop, ((0, sampler.text_tokens),), (grid,))
    exact = exact_flops(1, sampler.heads, layout.length, layout.length, sampler.width, sampler.width)
    costs = [students.bank[layer].flops(layout, 1, sampler.heads, sampler.width) / exact for layer in sampler.layers]
    return sum(costs) / len(costs)


def full_shares(cost: float, levels: int) -> tuple[float, ...]:
    """Shares of full attention to compare, for a student of this relative cost; the one that is learned for first."""
    if cost >= min(COSTS) - COST_MARGIN:
        return FULL_SHARES[:levels]
    return tuple((level - cost) / (1.0 - cost) for level in COSTS[:levels])


def work(plan: Plan) -> float:
    """Units of progress: images sampled."""
    return work_of_probes(plan) + plan.rollouts + float(RANKINGS * plan.levels * plan.validation_prompts)


def work_of_probes(plan: Plan) -> float:
    """The share of the probes: about twenty-five images for each prompt."""
    return 25.0 * plan.probe_prompts


def learn_routing(bench: Workbench, students: Students, tick: Tick) -> None:
    """Start the policy from the best ranking at hand, refine it by leave-one-out REINFORCE, record ``controller``.

    The training is saved after every update, so that an interrupted run goes on there.
    """
    start = time.perf_counter()
    plan = bench.plan()
    trainer, start_at = _start(bench, students, tick)
    prompts, seeds = bench.train_set(8)
    sink = JsonlSink(bench.run.path / CURVE_NAME)
    try:
        trainer.sinks = (sink,)
        updates = plan.rollouts // trainer.config.rollouts
        for _ in trainer.fit(prompts, seeds, updates, should_stop=_ticking(tick)):
            _save(bench, trainer, start_at)
    finally:
        sink.close()
    trainer.validate()
    _save(bench, trainer, start_at)
    _record(bench, trainer, start_at, student_cost(bench, students), time.perf_counter() - start)


def load_routing(bench: Workbench) -> Routing:
    """Load what Phase 2 left in the run.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another teacher.
    """
    loaded = _load_state(bench)
    if loaded is None:
        raise CheckpointError(f"no controller in {bench.run.controller}; run: ttr train-controller {bench.run.path}")
    state, start_at = loaded
    policy = _new_policy(bench)
    policy.load_state_dict(with_prefix(state["tensors"], "best."))
    return Routing(policy, unpack_contexts(state["manifest"]["contexts"]), start_at.scores)


def _start(bench: Workbench, students: Students, tick: Tick) -> tuple[ControllerTrainer, Start]:
    """Go on with the run's training, or begin it with the probe."""
    cost = student_cost(bench, students)
    backend = StudentBackend(students.bank)
    trainer = ControllerTrainer(
        bench.sampler,
        backend,
        _new_policy(bench),
        ControllerConfig(target_full=full_shares(cost, 1)[0]),
        seed=bench.run.settings.seed,
        student_cost=torch.full((len(bench.sampler.layers),), cost),
    )
    loaded = _load_state(bench)
    if loaded is not None:
        trainer.load_state_dict(loaded[0])
        return trainer, loaded[1]
    start_at = _rank_and_initialise(bench, trainer, backend, cost, tick)
    _save(bench, trainer, start_at)
    return trainer, start_at


def _rank_and_initialise(
    bench: Workbench, trainer: ControllerTrainer, backend: StudentBackend, cost: float, tick: Tick
) -> Start:
    """Rank the slots in four ways and give the policy the one that does best on other training prompts.

    The one-step probe sees the error a student makes within its step, the flips also what the steps after it make of
    that error, and "first steps" needs no measurement. Few prompts make flips noisy; the mean of both ranks keeps what
    they agree on. Every ranking is judged at all costs that the run compares.
    """
    prompts, seeds = bench.train_set(bench.plan().probe_prompts)
    steps, layers = bench.sampler.steps, len(bench.sampler.layers)
    share = work_of_probes(bench.plan()) / (steps * layers + flip_evaluations(steps, layers))

    def advance() -> None:
        tick(share)

    path = bench.sampler.trajectory(prompts, seeds)
    one_step = velocity_error_probe(bench.sampler, prompts, seeds, backend, path=path, on_evaluation=advance)
    first = torch.linspace(1.0, 0.0, steps).unsqueeze(1).repeat(1, layers)
    flips = flip_scores(bench.sampler, prompts, seeds, backend, path=path, on_evaluation=advance)
    rankings = {
        "first steps": first,
        "one-step probe": one_step,
        "flips": flips,
        "flips and first steps": _ranks(flips) + _ranks(first),
    }
    # Judged on other images than those that were probed.
    judged = bench.plan().validation_prompts
    pool_prompts, pool_seeds = bench.train_set(len(prompts) + judged)
    trainer.prepare(pool_prompts[-judged:], pool_seeds[-judged:])
    errors = {name: _judge(bench, trainer, scores, cost, tick) for name, scores in rankings.items()}
    chosen = min(errors, key=lambda name: errors[name])
    trainer.best = BestPolicy()
    trainer.initialise_from_probe(rankings[chosen])
    return Start(one_step, chosen, errors)


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each slot ``[steps, L]`` among all, 0 to 1; equal scores share the mean of their ranks."""
    flat = scores.flatten()
    below = (flat.unsqueeze(0) < flat.unsqueeze(1)).sum(1)
    equal = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(1)
    return ((below + 0.5 * (equal - 1)) / max(1, flat.numel() - 1)).view_as(scores)


def _judge(bench: Workbench, trainer: ControllerTrainer, scores: Tensor, cost: float, tick: Tick) -> float:
    """Error of a policy that learnt these scores on the validation images, geometric mean over the compared costs."""
    trainer.initialise_from_probe(scores)
    logs = []
    for share in full_shares(cost, bench.plan().levels):
        count = slot_count(bench.sampler.steps, trainer.eligible, share)
        mask = masks_from_policy(trainer.policy, trainer.contexts, count, eligible=trainer.eligible)
        logs.append(math.log(max(trainer.validation_error(mask), 1e-12)))
        tick(float(bench.plan().validation_prompts))
    return math.exp(sum(logs) / len(logs))


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


def _save(bench: Workbench, trainer: ControllerTrainer, start_at: Start) -> None:
    state = trainer.state_dict()
    tensors = {**state["tensors"], SCORES: start_at.scores}
    manifest = {"kind": KIND, "start": start_at.chosen, "start_errors": start_at.errors, **state["manifest"]}
    save_checkpoint(bench.run.controller, tensors, manifest, fingerprint=bench.teacher.fingerprint)


def _load_state(bench: Workbench) -> tuple[TrainerState, Start] | None:
    """Read the run's controller checkpoint; ``None`` if there is none yet."""
    if not bench.run.controller.exists():
        return None
    saved = load_checkpoint(bench.run.controller, fingerprint=bench.teacher.fingerprint)
    tensors, manifest = dict(saved.tensors), saved.manifest
    errors = manifest.get("start_errors")
    if manifest.get("kind") != KIND or SCORES not in tensors or not isinstance(errors, dict):
        raise CheckpointError(f"checkpoint {bench.run.controller} holds no controller")
    start_at = Start(tensors.pop(SCORES), str(manifest["start"]), errors)
    return {"tensors": tensors, "manifest": cast(TrainerManifest, manifest)}, start_at


def _record(bench: Workbench, trainer: ControllerTrainer, start_at: Start, cost: float, seconds: float) -> None:
    """Write the section ``controller``: the learning curve and the routing heat map."""
    rows: dict[int, MetricRow] = {}
    for line in (bench.run.path / CURVE_NAME).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[int(row["step"])] = row  # an update that was done twice, around an interruption, counts once
    curve = [
        {
            "rollouts": step * trainer.config.rollouts,
            "reward": row["reward"],
            "quality": row["loss"],
            "cost": cost + (1.0 - cost) * row["actual_full_attn_ratio"],
            "validation": row["best_error"],
        }
        for step, row in sorted(rows.items())
        if step <= trainer.updates
    ]
    routing = Routing(trainer.best_policy(), trainer.contexts, torch.empty(0))
    heatmap = {
        "layers": [str(layer) for layer in bench.sampler.layers],
        "sigmas": [context.sigma for context in routing.contexts],
        "full_probability": routing.full_probability().tolist(),
    }
    start = start_at.chosen
    section: dict[str, object] = {
        "method": f"{start}, then leave-one-out REINFORCE" if trainer.updates else start,
        "start": {"chosen": start, "validation_errors": start_at.errors},
        "rollouts": trainer.updates * trainer.config.rollouts,
        "target_full": trainer.config.target_full,
        "curve": curve,
        "heatmap": heatmap,
    }
    bench.run.record("controller", section, seconds)
