"""A sampler small enough to reason about: every (step, layer) slot has a known error.

``ToySampler`` integrates an ODE whose velocity comes from a stack of attention layers; each attention goes through the
handler as in a real host. The first channels are the image: attention mixes and contracts them. The remaining channels,
one per slot, are traces that exact attention leaves at zero. ``ToyBackend`` answers exactly, plus a known value in the
trace of its slot. Traces never enter queries or keys, so the final error of any mask is known in closed form
(``ToySampler.expected_error``): squared errors of student slots add up, and the best mask of a given size keeps the
largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from attn_dispatch.call import AttentionCall, AttentionHandler, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid, softmax_attention
from torch import Tensor

IMAGE_CHANNELS = 4


@dataclass(frozen=True)
class ToySamples:
    """Result of a toy run.

    Attributes:
        latent: ``[B, N, IMAGE_CHANNELS + steps * L]``.
        images: ``[B, 3, rows, columns]`` in [0, 1].
    """

    latent: Tensor
    images: Tensor


@dataclass(frozen=True)
class ToyPath:
    """States of exact sampling.

    Attributes:
        latents: ``[steps + 1, B, N, C]``.
        sigmas: ``[steps + 1]``.
    """

    latents: Tensor
    sigmas: Tensor


class ToySampler:
    """Euler sampler of a toy attention model.

    Args:
        damage: ``[steps, L]``, what a student adds to the velocity in its slot.
        rows: Rows of tokens.
        columns: Columns of tokens.
        growth: How fast trace errors grow towards the end: a trace is multiplied by ``1 + growth * |sigma step|`` in
            every later step. With 0, damage counts the same in every step.
    """

    def __init__(self, damage: Tensor, *, rows: int = 3, columns: int = 4, growth: float = 0.0) -> None:
        self.damage = damage
        self.steps, count = damage.shape
        self.layers = tuple(LayerKey("toy", index) for index in range(count))
        self.rows, self.columns = rows, columns
        self.growth = growth
        self.sigmas = torch.linspace(1.0, 0.0, self.steps + 1)
        self.calls = 0

    def contexts(self) -> tuple[StepContext, ...]:
        """The diffusion steps of every run."""
        return tuple(StepContext(float(sigma), 3.0, (self.rows, self.columns)) for sigma in self.sigmas[:-1])

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], handler: AttentionHandler | None = None
    ) -> ToySamples:
        """Sample one latent per prompt and seed."""
        latent = self._noise(prompts, seeds)
        if handler is not None:
            handler.begin_run()
        try:
            for step in range(self.steps):
                latent = self._advance(latent, step, self._velocity(latent, step, handler))
        finally:
            if handler is not None:
                handler.end_run()
        images = torch.sigmoid(latent[..., :3]).transpose(1, 2).reshape(-1, 3, self.rows, self.columns)
        return ToySamples(latent, images)

    def trajectory(self, prompts: Sequence[str], seeds: Sequence[int]) -> ToyPath:
        """Sample exactly and keep every state."""
        states = [self._noise(prompts, seeds)]
        for step in range(self.steps):
            states.append(self._advance(states[-1], step, self._velocity(states[-1], step, None)))
        return ToyPath(torch.stack(states), self.sigmas)

    def velocity(
        self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler | None = None
    ) -> Tensor:
        """Velocity of one step, ``[B, N, C]``."""
        if len(prompts) != latent.shape[0]:
            raise ValueError(f"{len(prompts)} prompts for {latent.shape[0]} latents")
        if handler is not None:
            handler.begin_run()
        try:
            return self._velocity(latent, step, handler)
        finally:
            if handler is not None:
                handler.end_run()

    def gradient_velocity(self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler) -> Tensor:
        """Velocity of one step with graph, ``[B, N, C]``."""
        return self.velocity(latent, step, prompts, handler)

    def expected_error(self, mask: Tensor, prompt: str, seed: int) -> float:
        """Relative RMSE that a mask ``[steps, L]`` (True = full) gives, in closed form."""
        step_sizes = (self.sigmas[1:] - self.sigmas[:-1]).abs()
        factors = 1.0 + self.growth * step_sizes
        gains = torch.stack([factors[step + 1 :].prod() for step in range(self.steps)])
        traces = self.damage * (step_sizes * gains)[:, None] * ~mask
        teacher = self.sample([prompt], [seed]).latent
        return float(traces.norm() * (self.rows * self.columns) ** 0.5 / teacher.norm())

    def slot(self, call: AttentionCall) -> tuple[int, int]:
        """Step and layer position of a call."""
        assert call.step is not None
        assert call.layer is not None
        step = int((self.sigmas[:-1] - call.step.sigma).abs().argmin())
        return step, self.layers.index(call.layer)

    def _noise(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        latent = torch.zeros(len(seeds), self.rows * self.columns, IMAGE_CHANNELS + self.damage.numel())
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            generator = torch.Generator().manual_seed(1_000 * len(prompt) + seed)
            latent[row, :, :IMAGE_CHANNELS] = torch.randn(latent.shape[1], IMAGE_CHANNELS, generator=generator)
        return latent

    def _advance(self, latent: Tensor, step: int, velocity: Tensor) -> Tensor:
        return latent + (self.sigmas[step + 1] - self.sigmas[step]) * velocity

    def _velocity(self, latent: Tensor, step: int, handler: AttentionHandler | None) -> Tensor:
        context = self.contexts()[step]
        layout = TokenLayout(latent.shape[1], (), (TokenGrid(0, self.rows, self.columns),))
        image = torch.zeros_like(latent)
        image[..., :IMAGE_CHANNELS] = latent[..., :IMAGE_CHANNELS]
        total = -self.growth * (latent - image)
        mixing = torch.ones(latent.shape[2])
        mixing[:IMAGE_CHANNELS] = 1.0 / len(self.layers)
        for index, layer in enumerate(self.layers):
            query = 2.0 * latent[:, None, :, :IMAGE_CHANNELS] * (1.0 + 0.1 * index)
            call = AttentionCall(query, query.roll(1, -1), image[:, None], layer=layer, step=context, layout=layout)
            answer = _exact(call) if handler is None else handler(call, _exact)
            total = total + answer[:, 0] * mixing
            self.calls += 1
        return total


class ToyBackend:
    """Student of the toy: exact attention plus the slot's known error.

    Args:
        sampler: Whose slots and errors to use.
        scale: Multiplies the errors.
        name: Name in reports.
    """

    def __init__(self, sampler: ToySampler, scale: float = 1.0, name: str = "student") -> None:
        self.sampler = sampler
        self.scale = scale
        self.name = name

    def refuses(self, call: AttentionCall) -> str | None:
        """Never."""
        return None

    def __call__(self, call: AttentionCall) -> Tensor:
        """Answer with the slot's error in its trace channel."""
        step, position = self.sampler.slot(call)
        answer = _exact(call).clone()
        channel = IMAGE_CHANNELS + step * len(self.sampler.layers) + position
        answer[..., channel] += self.scale * self.sampler.damage[step, position]
        return answer


def _exact(call: AttentionCall) -> Tensor:
    return softmax_attention(call.q, call.k, call.v).out
