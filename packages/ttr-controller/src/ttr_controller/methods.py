"""Every way to rank the (step, layer) slots by how much they need full attention, and what each one costs.

A ranking becomes a mask at any cost (``top_k_mask``) and the start of a policy (``fit_policy_to_scores``). Methods that
sample students say how many rollouts they took: images sampled, a gradient through an image counted as
``EVALUATIONS_PER_STEP`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.router import Backend
from torch import Tensor

from ttr_controller import budget
from ttr_controller.costs import AttentionCosts
from ttr_controller.knapsack import bucket_errors, knapsack_scores, layer_threshold_scores
from ttr_controller.layer_errors import LayerErrorMeter, measure_layer_errors
from ttr_controller.pairs import measure_pairs, pair_evaluations
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.probe import flip_evaluations, flip_scores, velocity_error_probe
from ttr_controller.relaxed import RelaxedConfig, RelaxedTrainer
from ttr_controller.rollout import GradientModel, Sampler, SamplerPath
from ttr_controller.trainer import ControllerConfig, ControllerTrainer

METHODS = ("pairs", "relaxed", "reinforce", "flips", "probe", "budget")
"""Names of the learners that a user can choose, the default first: it did best on held-out images at equal cost.

``"budget"`` weighs distillation error against cost by a knapsack and learns nothing.
"""
SIGMA_BUCKETS = 16
"""Errors of longer schedules are joined within so many ranges of sigma; each step of a shorter one stands alone."""

Images = tuple[Sequence[str], Sequence[int]]
"""Prompts, and one seed for each."""


@dataclass(frozen=True)
class Ranking:
    """What a method found.

    Attributes:
        method: Its name.
        scores: ``[steps, L]``, high = needs full attention.
        rollouts: Images that were sampled with students to find it.
    """

    method: str
    scores: Tensor
    rollouts: float


def rank_by_layer_error(
    sampler: Sampler, images: Images, backend: Backend, *, meter: LayerErrorMeter | None = None
) -> Ranking:
    """Rank layers, the same in every step, by the students' distance from the teacher's attention.

    Args:
        sampler: Makes images.
        images: On whose exact sampling the distances are measured.
        backend: The students.
        meter: What was measured on them, where the caller has it.
    """
    errors = (meter or measure_layer_errors(sampler, *images, backend)).errors()
    by_layer = errors.square().mean(dim=0).sqrt()
    return Ranking("layer error", layer_threshold_scores(by_layer, errors.shape[0]), 0.0)


def rank_by_budget(
    sampler: Sampler, images: Images, backend: Backend, costs: AttentionCosts, *, meter: LayerErrorMeter | None = None
) -> Ranking:
    """Rank by the knapsacks over the students' distance from the teacher's attention and the cost of either.

    Args:
        sampler: Makes images.
        images: On whose exact sampling the distances are measured.
        backend: The students.
        costs: Of full attention and of the students, measured or modelled.
        meter: What was measured on them, where the caller has it.
    """
    meter = meter or measure_layer_errors(sampler, *images, backend)
    errors = meter.errors()
    if len(meter.sigmas) > SIGMA_BUCKETS:
        errors = bucket_errors(meter.sigmas, meter.sigmas, errors, SIGMA_BUCKETS)
    return Ranking("budget", knapsack_scores(errors, costs.table), 0.0)


def rank_by_probe(
    model: GradientModel,
    images: Images,
    backend: Backend,
    *,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Ranking:
    """Rank by the error that one student slot makes within its own step; ``eligible`` ``[L]`` bool, ``None``: all."""
    scores = velocity_error_probe(model, *images, backend, eligible=eligible, path=path, on_evaluation=on_evaluation)
    return Ranking("probe", scores, float(scores.shape[1] * len(images[0])))


def rank_by_flips(
    model: GradientModel,
    images: Images,
    backend: Backend,
    *,
    every: int = 1,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Ranking:
    """Rank by the error that one student slot leaves in the final latent; ``eligible`` ``[L]`` bool, ``None``: all."""
    scores = flip_scores(
        model, *images, backend, every=every, eligible=eligible, path=path, on_evaluation=on_evaluation
    )
    steps, layers = scores.shape
    return Ranking("flips", scores, len(images[0]) * flip_evaluations(steps, layers, every) / steps)


def rank_by_pairs(
    model: GradientModel,
    images: Images,
    backend: Backend,
    shares: Sequence[float],
    *,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Ranking:
    """Rank by how student slots add up in the final latent, measured around the first slots full.

    Args:
        model: Sampler whose single steps can be asked for.
        images: Training images, all of which are sampled with every slot's change.
        backend: The students.
        shares: Shares of full attention that the ranking shall serve; the one in the middle is measured around.
        eligible: ``[L]`` bool; ``None``: all layers.
        path: The exact trajectory of the images where the caller has it.
        on_evaluation: Called once per model evaluation of the batch.

    Raises:
        ValueError: No share is given, or a share does not lie between 0 and 1.
    """
    if not shares or not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"shares between 0 and 1 must be given, got {tuple(shares)}")
    path = path or model.trajectory(*images)
    steps, layers = path.sigmas.shape[0] - 1, len(model.layers)
    able = layers if eligible is None else int(eligible.sum())
    counts = sorted({round(share * steps * able) for share in shares})
    middle = counts.pop(len(counts) // 2)
    centre = budget.first_steps_full(steps, layers, middle, eligible=eligible)
    errors = measure_pairs(model, *images, backend, centre, eligible=eligible, path=path, on_evaluation=on_evaluation)
    rollouts = len(images[0]) * pair_evaluations(steps, able) / steps
    return Ranking("pairs", errors.scores([middle, *counts]), rollouts)


def rank_by_relaxed_gates(
    model: GradientModel,
    pool: Images,
    backend: Backend,
    start: Ranking,
    config: RelaxedConfig | None = None,
    *,
    seed: int = 0,
    eligible: Tensor | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Ranking:
    """Refine a ranking by gradients through the sampler; the rollouts of the start count.

    Args:
        model: Sampler whose steps can be differentiated.
        pool: Training images to draw batches from.
        backend: The students.
        start: Ranking to start from.
        config: Settings.
        seed: Seed of every draw.
        eligible: ``[L]`` bool; ``None``: all layers.
        should_stop: Asked before each iteration.
    """
    trainer = RelaxedTrainer(model, backend, start.scores, config, seed=seed, eligible=eligible)
    for _ in trainer.fit(*pool, should_stop=should_stop):
        pass
    return Ranking("relaxed", trainer.scores, start.rollouts + trainer.evaluations() / start.scores.shape[0])


def rank_by_reinforce(
    sampler: Sampler,
    pool: Images,
    judged: Images,
    backend: Backend,
    start: Ranking,
    config: ControllerConfig,
    updates: int,
    *,
    seed: int = 0,
    policy: PolicyConfig | None = None,
    eligible: Tensor | None = None,
) -> Ranking:
    """Refine a ranking by leave-one-out REINFORCE; the best policy on the images ``judged`` is what counts.

    Args:
        sampler: Makes images.
        pool: Training images to draw batches from.
        judged: Training images on which candidates are compared.
        backend: The students.
        start: Ranking to start from.
        config: Settings.
        updates: Number of updates.
        seed: Seed of every draw.
        policy: Settings of the policy.
        eligible: ``[L]`` bool; ``None``: all layers.
    """
    net = RoutingPolicy(len(sampler.layers), policy, seed=seed)
    trainer = ControllerTrainer(sampler, backend, net, config, seed=seed, eligible=eligible)
    trainer.prepare(*judged)
    trainer.initialise_from_probe(start.scores)
    for _ in trainer.fit(*pool, updates):
        pass
    trainer.validate()
    with torch.no_grad():
        scores = trainer.best_policy().logits(trainer.contexts)
    judgements = trainer.judged_masks * len(judged[0])
    return Ranking("reinforce", scores, start.rollouts + updates * config.rollouts + judgements)


def simple_rules(steps: int, layers: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks ``[steps, L]`` of the rules that measure nothing, at an exact count of full slots."""
    return {
        "random": budget.random_mask(steps, layers, count, generator),
        "first steps": budget.first_steps_full(steps, layers, count),
        "last steps": budget.last_steps_full(steps, layers, count),
    }
