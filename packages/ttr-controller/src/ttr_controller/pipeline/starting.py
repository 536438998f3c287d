"""Where learning to route starts in a run: rankings of the slots, judged on training images, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from attn_dispatch import TokenLayout
from attn_kernels import TokenGrid
from attn_kernels.cost import exact_flops
from torch import Tensor
from ttr_distill.student import StudentBackend

from ttr_controller.budget import slot_count
from ttr_controller.costs import AttentionCosts, measure_costs
from ttr_controller.guard import masks_from_policy
from ttr_controller.methods import Images, Ranking, rank_by_budget, rank_by_flips, rank_by_probe
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
RANKINGS = 4
"""Rankings of the slots that the policy may start from."""


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


def work_of_probes(plan: Plan) -> float:
    """The share of the probes in the progress bar: about twenty-five images for each prompt."""
    return 25.0 * plan.probe_prompts


def start_training(
    bench: Workbench, trainer: ControllerTrainer, backend: StudentBackend, cost: float, method: str, tick: Tick
) -> Start:
    """Rank the slots as a method does and give the policy that ranking.

    ``"auto"`` ranks in four ways and takes the one that does best on other training prompts. The one-step probe sees
    the error a student makes within its step, the flips also what the steps after it make of that error, and "first
    steps" needs no measurement. Few prompts make flips noisy; the mean of both ranks keeps what they agree on. Every
    ranking is judged at all costs that the run compares.
    """
    prompts, seeds = bench.train_set(bench.plan().probe_prompts)
    judged = bench.plan().validation_prompts
    # Judged on other images than those that were probed.
    pool_prompts, pool_seeds = bench.train_set(len(prompts) + judged)
    trainer.prepare(pool_prompts[-judged:], pool_seeds[-judged:])
    rankings, one_step = _rankings(bench, (prompts, seeds), backend, trainer.costs, method, tick)
    errors = {name: _judge(bench, trainer, scores, cost, tick) for name, scores in rankings.items()}
    chosen = min(errors, key=lambda name: errors[name])
    trainer.best = BestPolicy()
    trainer.initialise_from_probe(rankings[chosen])
    return Start(one_step, chosen, errors)


def _rankings(
    bench: Workbench, images: Images, backend: StudentBackend, modelled: AttentionCosts, method: str, tick: Tick
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores by ranking, and the one-step probe's ``[steps, L]``."""
    steps, layers = bench.sampler.steps, len(bench.sampler.layers)
    flips_wanted = method not in ("probe", "reinforce", "budget")
    evaluations = steps * layers + (flip_evaluations(steps, layers, _every(method)) if flips_wanted else 0)
    share = work_of_probes(bench.plan()) / evaluations

    def advance() -> None:
        tick(share)

    path = bench.sampler.trajectory(*images)
    probe = rank_by_probe(bench.sampler, images, backend, path=path, on_evaluation=advance)
    if method == "budget":
        unit, costs = cost_table(bench, images, backend, modelled)
        scores = rank_by_budget(bench.sampler, images, backend, costs).scores
        return {f"knapsack of distillation error and {unit}": scores}, probe.scores
    if not flips_wanted:
        return {"one-step probe": probe.scores}, probe.scores
    flips: Ranking = rank_by_flips(
        bench.sampler, images, backend, every=_every(method), path=path, on_evaluation=advance
    )
    if method != "auto":
        return {"flips": flips.scores}, probe.scores
    first = torch.linspace(1.0, 0.0, steps).unsqueeze(1).repeat(1, layers)
    rankings = {
        "first steps": first,
        "one-step probe": probe.scores,
        "flips": flips.scores,
        "flips and first steps": _ranks(flips.scores) + _ranks(first),
    }
    return rankings, probe.scores


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


def _every(method: str) -> int:
    """Distance between steps whose errors are followed to the end; a run of limited time follows every other."""
    return 2 if method == "auto" else 1


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
