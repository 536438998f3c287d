"""What a rollout is: the sampler that makes one, and the record that scores it afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from attn_dispatch.call import AttentionCall, AttentionHandler, LayerKey, NativeAttention, StepContext
from torch import Tensor

from ttr_controller.inputs import Policy, StepInputs, ask
from ttr_controller.reinforce import bernoulli_log_prob, categorical_log_prob


class Samples(Protocol):
    """Result of one sampling run."""

    @property
    def latent(self) -> Tensor:
        """Final latent ``[B, N, C]`` (or any ``[B, ...]``)."""
        ...

    @property
    def images(self) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1]."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Makes images; the same prompts and seeds start from the same noise every time."""

    @property
    def layers(self) -> tuple[LayerKey, ...]:
        """Attention layers in running order."""
        ...

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], handler: AttentionHandler | None = None) -> Samples:
        """Sample one image per prompt; with a handler every attention goes through it."""
        ...


class SamplerPath(Protocol):
    """States that exact sampling passes through."""

    @property
    def latents(self) -> Tensor:
        """``[steps + 1, B, N, C]``: the latent before each step, then the result."""
        ...

    @property
    def sigmas(self) -> Tensor:
        """``[steps + 1]``: noise level before each step, then that of the result."""
        ...


@runtime_checkable
class VelocityModel(Protocol):
    """A sampler whose single steps can be asked for; what the error probe needs.

    Sampling must be the Euler rule ``latents[s + 1] = latents[s] + (sigmas[s + 1] - sigmas[s]) * velocity``.
    """

    @property
    def layers(self) -> tuple[LayerKey, ...]:
        """Attention layers in running order."""
        ...

    def trajectory(self, prompts: Sequence[str], seeds: Sequence[int]) -> SamplerPath:
        """Sample with exact attention and keep every state."""
        ...

    def velocity(
        self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler | None = None
    ) -> Tensor:
        """Velocity ``[B, N, C]`` (after guidance) that the model gives a latent ``[B, N, C]`` in step ``step``.

        A handler is attached for this evaluation only, between its ``begin_run`` and ``end_run``.
        """
        ...


@runtime_checkable
class GradientModel(VelocityModel, Protocol):
    """A sampler whose single steps can be differentiated; what relaxed gates need."""

    def gradient_velocity(self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler) -> Tensor:
        """Velocity ``[B, N, C]`` as ``velocity`` gives it, with graph to the latent and to what the handler adds."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """Steps of one rollout with the actions taken, and what is needed to score them again.

    Attributes:
        contexts: The diffusion steps in order of appearance, exactly as the policy saw them.
        actions: ``[steps][L]``, number of the attention taken: 0 = full, then the alternatives.
        inputs: Further inputs that the policy saw in each step; empty if it saw none.
        threshold: Decision threshold at which the actions were drawn.
        temperature: Temperature at which the actions were drawn.
    """

    contexts: tuple[StepContext, ...]
    actions: tuple[tuple[int, ...], ...]
    inputs: tuple[StepInputs | None, ...] = ()
    threshold: float = 0.5
    temperature: float = 1.0

    def choices(self) -> Tensor:
        """Actions as ``[steps, L]`` int64."""
        return torch.tensor(self.actions, dtype=torch.int64)

    def mask(self) -> Tensor:
        """Where full attention ran, ``[steps, L]`` bool."""
        return self.choices() == 0


def decision_logits(logits: Tensor, threshold: float, temperature: float) -> Tensor:
    """Logits of the distribution that actions are drawn from.

    The threshold moves the point of even odds from probability 0.5 to ``threshold``; the temperature divides the
    distance to it, so that above 1 choices get more random and towards 0 they become the threshold rule.

    Args:
        logits: ``[..., L]``, the policy's answer with one alternative.
        threshold: Between 0 and 1.
        temperature: Positive.

    Raises:
        ValueError: A setting is out of range.
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must lie strictly between 0 and 1, got {threshold}")
    if not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"temperature must be finite and positive, got {temperature}")
    return (logits - math.log(threshold / (1.0 - threshold))) / temperature


def decision_logits_of_many(logits: Tensor, threshold: float, temperature: float) -> Tensor:
    """As ``decision_logits`` for logits ``[..., L, A]``; the threshold moves full attention against all others."""
    full = decision_logits(logits[..., :1], threshold, temperature)
    return torch.cat([full, logits[..., 1:] / temperature], dim=-1)


def trajectory_logits(policy: Policy, trajectory: Trajectory) -> Tensor:
    """Decision logits of a recorded trajectory under the policy as it is now, with graph.

    Returns:
        ``[steps, L]`` with one alternative, ``[steps, L, A]`` with several.

    Raises:
        ValueError: The trajectory has no step.
    """
    if not trajectory.contexts:
        raise ValueError("the trajectory has no step: the policy's guard was never asked during the rollout")
    inputs = trajectory.inputs or (None,) * len(trajectory.contexts)
    logits = torch.stack([ask(policy, step, seen) for step, seen in zip(trajectory.contexts, inputs, strict=True)])
    decide = decision_logits if logits.ndim == 2 else decision_logits_of_many
    return decide(logits, trajectory.threshold, trajectory.temperature)


def trajectory_log_prob(policy: Policy, trajectory: Trajectory, eligible: Tensor | None = None) -> Tensor:
    """Log-probability ``[]`` of a trajectory's actions over eligible layers, recomputed with graph.

    Args:
        policy: Maps a step to logits.
        trajectory: What the guard recorded.
        eligible: ``[L]`` bool, or ``[L, A]`` with several alternatives; ``None``: all layers.

    Raises:
        ValueError: The trajectory has no step, or shapes differ.
    """
    return step_log_probs(trajectory_logits(policy, trajectory), trajectory, eligible).sum()


def step_log_probs(logits: Tensor, trajectory: Trajectory, eligible: Tensor | None = None) -> Tensor:
    """Log-probability ``[steps]`` of the actions of each step under decision logits of ``trajectory_logits``."""
    if logits.ndim == 2:
        return bernoulli_log_prob(logits, trajectory.mask().to(logits.device), eligible)
    return categorical_log_prob(logits, trajectory.choices().to(logits.device), eligible)


def step_key(step: StepContext) -> StepContext:
    """The diffusion step a context belongs to, whichever part of the guided batch it is.

    A host may run the conditional and the unconditional half as separate calls; both halves of a step share one mask.
    """
    return replace(step, cond_or_uncond=()) if step.cond_or_uncond else step


class ContextRecorder:
    """Handler that answers everything exactly and notes the diffusion steps it sees, in order."""

    def __init__(self) -> None:
        self._seen: dict[StepContext, None] = {}

    @property
    def contexts(self) -> tuple[StepContext, ...]:
        """Steps of the last run."""
        return tuple(self._seen)

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer with exact attention."""
        if call.step is not None:
            self._seen[step_key(call.step)] = None
        return native(call)

    def begin_run(self) -> None:
        """Forget the run before."""
        self._seen = {}

    def end_run(self) -> None:
        """Keep what was seen."""
