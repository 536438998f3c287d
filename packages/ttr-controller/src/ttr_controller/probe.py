"""How much each layer's student disturbs the teacher's own trajectory, before anything is learnt.

Both probes walk along the states of exact sampling and let the student answer in one (step, layer) slot alone. They
cost no rollout of their own: one model evaluation per slot, shared by all prompts of the batch. Scores rank slots for
``top_k_mask``; errors of several slots add up nearly as squares, so scores of several prompts are joined by their root
mean square and the ranking by score is the ranking by squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attn_dispatch.call import AttentionCall, LayerKey
from attn_dispatch.router import AttentionRouter, Backend, Route
from torch import Tensor

from ttr_controller.rollout import SamplerPath, VelocityModel

OnEvaluation = Callable[[], None]
"""Called after each model evaluation; a place for a progress bar, or to raise and stop."""


class OneLayerGuard:
    """Lets the student answer in one layer only.

    Args:
        layer: That layer.
    """

    def __init__(self, layer: LayerKey) -> None:
        self.layer = layer

    def __call__(self, call: AttentionCall) -> str | None:
        """Answer ``None`` in the layer, else why full attention runs."""
        return None if call.layer == self.layer else "another layer is probed"


@torch.no_grad()
def velocity_error_probe(
    model: VelocityModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    backend: Backend,
    *,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Tensor:
    """Measure the error that one student slot makes within its own step.

    The score of (step, layer) is ``|sigma step| * ||velocity with the student - exact velocity||`` relative to the norm
    of the final latent, as a root mean square over prompts.

    Args:
        model: Sampler whose single steps can be asked for.
        prompts: One per image.
        seeds: One per image.
        backend: The students.
        eligible: ``[L]`` bool; other layers are not measured and score 0. ``None``: all layers.
        path: The exact trajectory of these prompts and seeds where the caller has it; else it is sampled here.
        on_evaluation: Called after each of the ``steps * L`` evaluations.

    Returns:
        ``[steps, L]`` float32, high = needs full attention.
    """
    path = path or model.trajectory(prompts, seeds)
    steps = path.sigmas.shape[0] - 1
    scores = torch.zeros(steps, len(model.layers))
    for step in range(steps):
        for position in _positions(model, eligible):
            moved = _one_slot_step(model, path, step, position, prompts, backend)
            scores[step, position] = _relative_error(moved, path.latents[step + 1], path.latents[-1])
            if on_evaluation is not None:
                on_evaluation()
    return scores


@torch.no_grad()
def step_gains(
    model: VelocityModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    backend: Backend,
    *,
    path: SamplerPath | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Tensor:
    """Measure how much an error made in a step has grown by the end of sampling.

    In each step all students answer once, then exact attention samples to the end; the gain is the final distance from
    the teacher's latent over the distance right after the step. Multiplied onto the one-step scores it puts errors of
    early and late steps on one scale, at a cost of ``steps * (steps + 1) / 2`` evaluations.

    Args:
        model: Sampler whose single steps can be asked for.
        prompts: One per image.
        seeds: One per image.
        backend: The students.
        path: The exact trajectory of these prompts and seeds where the caller has it; else it is sampled here.
        on_evaluation: Called after each evaluation.

    Returns:
        ``[steps]`` float32; 1 for the last step.
    """
    path = path or model.trajectory(prompts, seeds)
    steps = path.sigmas.shape[0] - 1
    students = AttentionRouter((Route(backend),))
    gains = torch.ones(steps)
    for step in range(steps):
        velocity = model.velocity(path.latents[step], step, prompts, students)
        latent = _euler(path, step, path.latents[step], velocity)
        before = (latent - path.latents[step + 1]).float().norm()
        if on_evaluation is not None:
            on_evaluation()
        latent = _finish(model, path, step + 1, latent, prompts, on_evaluation)
        after = (latent - path.latents[-1]).float().norm()
        gains[step] = (after / before).item() if before > 0 else 1.0
    return gains


@torch.no_grad()
def flip_scores(
    model: VelocityModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    backend: Backend,
    *,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Tensor:
    """Measure the error that one student slot leaves in the final latent.

    As ``velocity_error_probe``, but each disturbed state is sampled to the end with exact attention (all layers of a
    step as one batch). Costs about ``steps / 2`` times as much.

    Args:
        model: Sampler whose single steps can be asked for.
        prompts: One per image.
        seeds: One per image.
        backend: The students.
        eligible: ``[L]`` bool; other layers score 0. ``None``: all layers.
        path: The exact trajectory of these prompts and seeds where the caller has it; else it is sampled here.
        on_evaluation: Called after each evaluation.

    Returns:
        ``[steps, L]`` float32, high = needs full attention.
    """
    path = path or model.trajectory(prompts, seeds)
    steps = path.sigmas.shape[0] - 1
    positions = _positions(model, eligible)
    scores = torch.zeros(steps, len(model.layers))
    for step in range(steps):
        moved = []
        for position in positions:
            moved.append(_one_slot_step(model, path, step, position, prompts, backend))
            if on_evaluation is not None:
                on_evaluation()
        finals = _finish(model, path, step + 1, torch.cat(moved), list(prompts) * len(positions), on_evaluation)
        for position, final in zip(positions, finals.chunk(len(positions)), strict=True):
            scores[step, position] = _relative_error(final, path.latents[-1], path.latents[-1])
    return scores


def _one_slot_step(
    model: VelocityModel, path: SamplerPath, step: int, position: int, prompts: Sequence[str], backend: Backend
) -> Tensor:
    """Latent ``[B, ...]`` after an exact trajectory's step in which one layer had its student."""
    handler = AttentionRouter((Route(backend, (OneLayerGuard(model.layers[position]),)),))
    return _euler(path, step, path.latents[step], model.velocity(path.latents[step], step, prompts, handler))


def _finish(
    model: VelocityModel,
    path: SamplerPath,
    start: int,
    latent: Tensor,
    prompts: Sequence[str],
    on_evaluation: OnEvaluation | None,
) -> Tensor:
    """Sample a latent from step ``start`` to the end with exact attention."""
    for step in range(start, path.sigmas.shape[0] - 1):
        latent = _euler(path, step, latent, model.velocity(latent, step, prompts))
        if on_evaluation is not None:
            on_evaluation()
    return latent


def _euler(path: SamplerPath, step: int, latent: Tensor, velocity: Tensor) -> Tensor:
    return latent + (path.sigmas[step + 1] - path.sigmas[step]).to(latent) * velocity


def _relative_error(latent: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Root mean square over the batch of ``||latent - exact|| / ||scale||``."""
    distance = (latent - exact).float().flatten(1).norm(dim=1)
    return float((distance / scale.float().flatten(1).norm(dim=1)).square().mean().sqrt())


def _positions(model: VelocityModel, eligible: Tensor | None) -> list[int]:
    """Positions of the layers to measure.

    Raises:
        ValueError: None is eligible, or the length is wrong.
    """
    if eligible is None:
        return list(range(len(model.layers)))
    if eligible.shape != (len(model.layers),):
        raise ValueError(f"eligible must be [L] = [{len(model.layers)}], got {tuple(eligible.shape)}")
    positions = [position for position, ready in enumerate(eligible.tolist()) if ready]
    if not positions:
        raise ValueError("no layer is eligible: there is nothing to probe")
    return positions
