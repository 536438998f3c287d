"""Where learning to route starts in a run: rankings of the slots, judged on training images, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from attn_dispatch import TokenLayout
from attn_kernels import TokenGrid
from attn_kernels.cost import exact_flops
from torch import Tensor
from ttr_distill.student import StudentBackend

from ttr_controller.budget import first_steps_full, slot_count
from ttr_controller.costs import AttentionCosts, measure_costs
from ttr_controller.guard import masks_from_policy
from ttr_controller.layer_errors import measure_layer_errors
from ttr_controller.methods import (
    Images,
    Ranking,
    rank_by_budget,
    rank_by_flips,
    rank_by_layer_error,
    rank_by_pairs,
    rank_by_probe,
)
from ttr_controller.pairs import measure_pairs, pair_evaluations
from ttr_controller.pipeline.settings import Plan
from ttr_controller.pipeline.workbench import Students, Tick, Workbench
from ttr_controller.probe import flip_evaluations
from ttr_controller.trainer import BestPolicy, ControllerTrainer

COSTS = (0.5, 2 / 3, 5 / 6)
"""Relative attention costs that are compared; the policy is trained at the first."""
FULL_SHARES = (0.5, 0.25, 0.75)
"""Shares of full attention compared where the student is too dear for the lowest cost."""
COST_MARGIN = 0.05
"""A student must be this much cheaper than a cost for the cost to leave it anything to do."""
PAIRS_AROUND_EXACT = "pairs around exact sampling"
"""Pairs from the measurement that gives the flips as well; the method ``"pairs"`` measures around a middle mask."""
RANKINGS = 5
"""Rankings of the slots that the policy of ``"auto"`` may start from."""


@dataclass(frozen=True)
class Start:
    """Where learning starts.

    Attributes:
        scores: ``[steps, L]``, the one-step probe's score of each slot.
        chosen: Name of the ranking that the policy was given.
        errors: Error of each ranking on training prompts that it was not made from, geometric mean over the costs
            that the run compares.
        rankings: Scores ``[steps, L]`` of every method that was measured on the way, by its name.
        rollouts: Images sampled with students until here.
        curve: Rollouts and error on the validation images at the target, before anything was measured (the first
            steps full) and with the chosen ranking.
    """

    scores: Tensor
    chosen: str
    errors: dict[str, float]
    rankings: dict[str, Tensor] = field(default_factory=dict)
    rollouts: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Measured:
    """Rankings before they are judged.

    Attributes:
        candidates: Scores that the policy may start from, by what a reader is told.
        rankings: Every method's scores, by its name.
        rollouts: Images sampled with students.
    """

    candidates: dict[str, Tensor]
    rankings: dict[str, Tensor]
    rollouts: float


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


def work_of_probes(plan: Plan) -> float:
    """The share of the probes in the progress bar: about twenty-five images for each prompt."""
    return 25.0 * plan.probe_prompts


def start_training(
    bench: Workbench,
    trainer: ControllerTrainer,
    backend: StudentBackend,
    cost: float,
    method: str,
    tick: Tick,
    images: int | None = None,
) -> Start:
    """Rank the slots as a method does and give the policy that ranking.

    ``"auto"`` ranks in five ways and takes the one that does best on other training prompts. The one-step probe sees
    the error a student makes within its step, the flips also what the steps after it make of that error, pairs also
    what slots do to one another; "first steps" needs no measurement. Few prompts make flips noisy; the mean of both
    ranks keeps what they agree on. Every ranking is judged at all costs that the run compares.

    Args:
        bench: The run's objects.
        trainer: Its policy gets the ranking.
        backend: The students.
        cost: Of the students relative to full attention.
        method: ``"auto"`` or one of ``METHODS``.
        tick: Moves the progress bar.
        images: Training images to measure on; ``None``: the plan's.
    """
    prompts, seeds = bench.train_set(images or bench.plan().probe_prompts)
    judged = bench.plan().validation_prompts
    # Judged on other images than those that were probed.
    pool_prompts, pool_seeds = bench.train_set(len(prompts) + judged)
    trainer.prepare(pool_prompts[-judged:], pool_seeds[-judged:])
    found = _measure(bench, (prompts, seeds), backend, trainer.costs, cost, method, tick)
    errors = {name: _judge(bench, trainer, scores, cost, tick) for name, scores in found.candidates.items()}
    chosen = min(errors, key=lambda name: errors[name])
    trainer.best = BestPolicy()
    trainer.initialise_from_probe(found.candidates[chosen])
    steps, layers = found.candidates[chosen].shape
    first = first_steps_full(steps, layers, trainer.full_slots, eligible=trainer.eligible)
    curve = ((0.0, trainer.validation_error(first)), (found.rollouts, trainer.best.error))
    return Start(found.rankings["probe"], chosen, errors, found.rankings, found.rollouts, curve)


def _measure(
    bench: Workbench,
    images: Images,
    backend: StudentBackend,
    modelled: AttentionCosts,
    cost: float,
    method: str,
    tick: Tick,
) -> Measured:
    """Measure what a method needs, and the rankings that cost next to nothing."""
    model, steps, layers = bench.sampler, bench.sampler.steps, len(bench.sampler.layers)
    extra = {
        "auto": pair_evaluations(steps, layers),
        "pairs": pair_evaluations(steps, layers),
        "flips": flip_evaluations(steps, layers, 1),
        "relaxed": flip_evaluations(steps, layers, 1),
    }
    share = work_of_probes(bench.plan()) / (steps * layers + extra.get(method, 0))

    def advance() -> None:
        tick(share)

    meter = measure_layer_errors(model, *images, backend)
    path = model.trajectory(*images)
    probe = rank_by_probe(model, images, backend, path=path, on_evaluation=advance)
    known = [rank_by_layer_error(model, images, backend, meter=meter), probe]
    budget = rank_by_budget(model, images, backend, modelled, meter=meter)
    candidates = {"one-step probe": probe.scores}
    if method == "budget":
        unit, costs = cost_table(bench, images, backend, modelled)
        budget = rank_by_budget(model, images, backend, costs, meter=meter)
        candidates = {f"knapsack of distillation error and {unit}": budget.scores}
    elif method in ("flips", "relaxed"):
        known.append(rank_by_flips(model, images, backend, path=path, on_evaluation=advance))
        candidates = {"flips": known[-1].scores}
    elif method == "pairs":
        shares = full_shares(cost, bench.plan().levels)
        known.append(rank_by_pairs(model, images, backend, shares, path=path, on_evaluation=advance))
        candidates = {"pairs": known[-1].scores}
    elif method == "auto":
        # One measurement around exact sampling gives both.
        exact = torch.ones(steps, layers, dtype=torch.bool)
        errors = measure_pairs(model, *images, backend, exact, path=path, on_evaluation=advance)
        rollouts = len(images[0]) * pair_evaluations(steps, layers) / steps
        counts = [round(share * steps * layers) for share in full_shares(cost, bench.plan().levels)]
        known += [Ranking("flips", errors.alone(), 0.0), Ranking(PAIRS_AROUND_EXACT, errors.scores(counts), rollouts)]
        first = torch.linspace(1.0, 0.0, steps).unsqueeze(1).repeat(1, layers)
        candidates |= {"first steps": first, "flips": errors.alone(), PAIRS_AROUND_EXACT: known[-1].scores}
        candidates["flips and first steps"] = _ranks(errors.alone()) + _ranks(first)
    rollouts = sum(one.rollouts for one in known)
    return Measured(candidates, {one.method: one.scores for one in (*known, budget)}, rollouts)


def cost_table(
    bench: Workbench, images: Images, backend: StudentBackend, modelled: AttentionCosts
) -> tuple[str, AttentionCosts]:
    """Cost of full attention and student in each layer, the same in all processes.

    Measured, or as modelled where the students are slower here than full attention: at sizes too small for them a
    plan by the clock would use none.

    Returns:
        The unit, ``"milliseconds"`` or ``"operations"``, and the costs.
    """
    prompts, seeds = images
    measured = measure_costs(bench.sampler, (backend,), prompts[:1], seeds[:1])
    measured = AttentionCosts(measured.names, bench.world.gather(measured.table)[0])
    full, student = measured.table.sum(dim=0).tolist()
    return ("milliseconds", measured) if student < full else ("operations", modelled)


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
