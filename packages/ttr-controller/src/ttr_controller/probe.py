"""How much each layer's student disturbs the teacher's own trajectory, before anything is learnt.

Both probes walk along the states of exact sampling and let the student answer in one (step, layer) slot alone. They
share the evaluations among all prompts of the batch. ``velocity_error_probe`` looks at the step itself. ``flip_scores``
looks at the end of sampling, and is the one to route by: an error made early is sampled with for many steps, and with
classifier-free guidance it grows several times over, by an amount that depends on the layer.

Scores rank slots for ``top_k_mask``. Errors of several slots add up nearly as squares, so scores of several prompts are
joined by their root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

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
    of the final latent, as a root mean square over prompts. It says nothing about what becomes of the error later.

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
            errors = _relative_errors(moved, path.latents[step + 1], path.latents[-1])
            scores[step, position] = errors.square().mean().sqrt()
            _tick(on_evaluation, 1)
    return scores


@torch.no_grad()
def flip_scores(
    model: VelocityModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    backend: Backend,
    *,
    every: int = 2,
    eligible: Tensor | None = None,
    path: SamplerPath | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Tensor:
    """Measure the error that one student slot leaves in the final latent.

    Every slot's one-step error is measured. In every ``every``-th step the disturbed states are also sampled to the end
    with exact attention, which gives the growth of each layer's error from there; growth in the steps between is
    interpolated in its logarithm, and is 1 in the last step. ``every=1`` measures all slots to the end.

    Args:
        model: Sampler whose single steps can be asked for.
        prompts: One per image.
        seeds: One per image.
        backend: The students.
        every: Distance between steps whose errors are followed to the end.
        eligible: ``[L]`` bool; other layers score 0. ``None``: all layers.
        path: The exact trajectory of these prompts and seeds where the caller has it; else it is sampled here.
        on_evaluation: Called once per model evaluation of the batch of prompts, ``flip_evaluations`` times in all.

    Returns:
        ``[steps, L]`` float32, final error relative to the norm of the latent; high = needs full attention.

    Raises:
        ValueError: ``every`` is not positive, or no layer is eligible.
    """
    path = path or model.trajectory(prompts, seeds)
    steps = path.sigmas.shape[0] - 1
    followed = _followed_steps(steps, every)
    positions = _positions(model, eligible)
    count, images = len(positions), len(prompts)
    one_step = torch.zeros(steps, count, images)
    growth = torch.ones(len(followed) + 1, count, images)
    for step in range(steps):
        moved = []
        for position in positions:
            moved.append(_one_slot_step(model, path, step, position, prompts, backend))
            _tick(on_evaluation, 1)
        one_step[step] = torch.stack([_relative_errors(m, path.latents[step + 1], path.latents[-1]) for m in moved])
        if step in followed:
            latent = torch.cat(moved)
            for later in range(step + 1, steps):
                latent = _euler(path, later, latent, model.velocity(latent, later, list(prompts) * count))
                _tick(on_evaluation, count)
            final = torch.stack([_relative_errors(m, path.latents[-1], path.latents[-1]) for m in latent.chunk(count)])
            growth[followed.index(step)] = torch.where(one_step[step] > 0, final / one_step[step], 1.0)
    errors = one_step * _interpolate_growth(growth, (*followed, steps - 1), steps)
    scores = torch.zeros(steps, len(model.layers))
    scores[:, positions] = errors.square().mean(dim=2).sqrt()
    return scores


def flip_evaluations(steps: int, layers: int, every: int = 2) -> int:
    """Model evaluations of ``flip_scores`` with ``layers`` eligible layers; a rollout takes ``steps`` of them."""
    return layers * (steps + sum(steps - 1 - step for step in _followed_steps(steps, every)))


def _followed_steps(steps: int, every: int) -> tuple[int, ...]:
    """Steps before the last whose errors are followed to the end."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    return tuple(range(0, steps - 1, every))


def _interpolate_growth(growth: Tensor, at: Sequence[int], steps: int) -> Tensor:
    """Growth ``[steps, L, B]`` from growth ``[len(at), L, B]`` at some steps, linear in its logarithm."""
    logs = growth.clamp_min(1e-6).log()
    filled = torch.empty(steps, *growth.shape[1:])
    filled[at[-1]] = logs[-1]
    for number, (left, right) in enumerate(pairwise(at)):
        for step in range(left, right):
            filled[step] = torch.lerp(logs[number], logs[number + 1], (step - left) / (right - left))
    return filled.exp()


def _one_slot_step(
    model: VelocityModel, path: SamplerPath, step: int, position: int, prompts: Sequence[str], backend: Backend
) -> Tensor:
    """Latent ``[B, ...]`` after an exact trajectory's step in which one layer had its student."""
    handler = AttentionRouter((Route(backend, (OneLayerGuard(model.layers[position]),)),))
    return _euler(path, step, path.latents[step], model.velocity(path.latents[step], step, prompts, handler))


def _euler(path: SamplerPath, step: int, latent: Tensor, velocity: Tensor) -> Tensor:
    return latent + (path.sigmas[step + 1] - path.sigmas[step]).to(latent) * velocity


def _relative_errors(latent: Tensor, exact: Tensor, scale: Tensor) -> Tensor:
    """``||latent - exact|| / ||scale||`` per batch item, ``[B]`` on the CPU."""
    distance = torch.linalg.vector_norm((latent - exact).float().flatten(1), dim=1)
    return torch.div(distance, torch.linalg.vector_norm(scale.float().flatten(1), dim=1)).cpu()


def _tick(on_evaluation: OnEvaluation | None, times: int) -> None:
    if on_evaluation is not None:
        for _ in range(times):
            on_evaluation()


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
