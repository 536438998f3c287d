"""Sampling from the tiny teacher, with or without an attention handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from attn_dispatch.call import AttentionHandler, LayerKey
from torch import Tensor

from ttr_distill.tiny.schedule import initial_noise, sigma_schedule
from ttr_distill.tiny.teacher import TinyTeacher
from ttr_distill.tiny.text import TextEncoding


class Samples(NamedTuple):
    """Finished samples.

    Attributes:
        latent: ``[B, N, 16]``.
        images: ``[B, 3, 4 * rows, 4 * columns]`` in ``[0, 1]``.
    """

    latent: Tensor
    images: Tensor


class SamplerPath(NamedTuple):
    """States that exact sampling passes through.

    Attributes:
        latents: ``[steps + 1, B, N, 16]``: the noise, the latent after each step, the result last.
        sigmas: ``[steps + 1]``: noise level of each state.
    """

    latents: Tensor
    sigmas: Tensor


class TinySampler:
    """Euler sampler with classifier-free guidance in one batch.

    The conditional rows come first, then the unconditional ones. With ``guidance=1.0`` there are only conditional rows.

    Args:
        teacher: The model.
        rows: Rows of tokens; one token is 4 x 4 pixels.
        columns: Columns of tokens.
        steps: Euler steps.
        guidance: Classifier-free guidance scale; 1.0 = none.
    """

    def __init__(
        self, teacher: TinyTeacher, *, rows: int = 32, columns: int = 32, steps: int = 8, guidance: float = 3.0
    ) -> None:
        if rows < 1 or columns < 1 or steps < 1:
            raise ValueError(f"rows, columns and steps must be at least 1, got {rows}, {columns}, {steps}")
        self.teacher = teacher
        self.rows = rows
        self.columns = columns
        self.steps = steps
        self.guidance = guidance

    @property
    def layers(self) -> tuple[LayerKey, ...]:
        """The attention layers in the order in which they run."""
        transformer = self.teacher.transformer
        double = len(cast("Sequence[object]", transformer.transformer_blocks))
        single = len(cast("Sequence[object]", transformer.single_transformer_blocks))
        return (*(LayerKey("double", i) for i in range(double)), *(LayerKey("single", i) for i in range(single)))

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.teacher.transformer.config["num_attention_heads"])  # type: ignore[index]

    @property
    def width(self) -> int:
        """Width of an attention head."""
        return int(self.teacher.transformer.config["attention_head_dim"])  # type: ignore[index]

    @property
    def text_tokens(self) -> int:
        """Text tokens of a caption."""
        return self.teacher.vocabulary.text_tokens

    @property
    def sigmas(self) -> Tensor:
        """Noise levels ``[steps + 1]``."""
        return sigma_schedule(self.steps, self.rows * self.columns)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        handler: AttentionHandler | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Samples:
        """Draw one image for each pair of prompt and seed.

        Args:
            prompts: Captions.
            seeds: One seed a caption; prompt and seed fix the image, whatever else is in the batch.
            handler: Answers every attention of the transformer; its run begins and ends here.
            on_step: Called after each step with its number, from 0.

        Returns:
            Latents and images on the teacher's device.

        Raises:
            ValueError: Numbers of prompts and seeds differ, none was given, or a caption has an unknown word.
        """
        latent = self.noise(prompts, seeds)
        with torch.inference_mode():
            encoding = self._encode(prompts)
            with self._run(handler):
                latent = self._integrate(latent, encoding, handler, on_step)
            images = self.teacher.decode(latent, self.rows, self.columns)
        # Copies made out here are ordinary tensors, which a later training step may save for its backward pass.
        return Samples(latent.clone(), images.clone())

    def trajectory(self, prompts: Sequence[str], seeds: Sequence[int]) -> SamplerPath:
        """Sample with exact attention and keep every state.

        Args:
            prompts: Captions.
            seeds: One seed a caption.

        Raises:
            ValueError: Numbers of prompts and seeds differ, none was given, or a caption has an unknown word.
        """
        latent = self.noise(prompts, seeds)
        latents = [latent]
        sigmas = self.sigmas
        for step in range(self.steps):
            latent = latent + (sigmas[step + 1] - sigmas[step]).to(latent) * self.velocity(latent, step, prompts)
            latents.append(latent)
        return SamplerPath(torch.stack(latents), sigmas)

    def velocity(
        self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler | None = None
    ) -> Tensor:
        """Evaluate the guided velocity once.

        Args:
            latent: ``[B, N, 16]``.
            step: Number of the step, from 0; decides the noise level.
            prompts: B captions.
            handler: Answers every attention of this evaluation, between its ``begin_run`` and ``end_run``.

        Returns:
            ``[B, N, 16]``.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be from 0 to {self.steps - 1}, got {step}")
        with torch.inference_mode():
            encoding = self._encode(prompts)
            with self._run(handler), self._attached(handler):
                velocity = self._guided_velocity(latent, float(self.sigmas[step]), encoding)
        return velocity.clone()

    def noise(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Initial latents ``[B, N, 16]`` of pairs of prompt and seed, on the teacher's device.

        Raises:
            ValueError: Numbers of prompts and seeds differ, or none was given.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"give one seed a prompt and at least one, got {len(prompts)} prompts, {len(seeds)} seeds")
        return initial_noise(seeds, self.rows, self.columns, self.teacher.codec.channels).to(self.teacher.device)

    def _encode(self, prompts: Sequence[str]) -> TextEncoding:
        guided = self.guidance != 1.0
        return self.teacher.encode([*prompts, *([""] * len(prompts))] if guided else prompts)

    @staticmethod
    @contextmanager
    def _run(handler: AttentionHandler | None) -> Iterator[None]:
        """Tell the handler that a run begins and, whatever happens, that it is over."""
        if handler is None:
            yield
            return
        handler.begin_run()
        try:
            yield
        finally:
            handler.end_run()

    def _integrate(
        self,
        latent: Tensor,
        encoding: TextEncoding,
        handler: AttentionHandler | None,
        on_step: Callable[[int], None] | None,
    ) -> Tensor:
        sigmas = self.sigmas.tolist()
        with self._attached(handler):
            for index, (sigma, following) in enumerate(pairwise(sigmas)):
                latent = latent + (following - sigma) * self._guided_velocity(latent, sigma, encoding)
                if on_step is not None:
                    on_step(index)
        return latent

    def _guided_velocity(self, latent: Tensor, sigma: float, encoding: TextEncoding) -> Tensor:
        if self.guidance == 1.0:
            return self.teacher.velocity(latent, sigma, encoding, self.rows, self.columns)
        both = self.teacher.velocity(torch.cat([latent, latent]), sigma, encoding, self.rows, self.columns)
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _attached(self, handler: AttentionHandler | None) -> AbstractContextManager[object]:
        if handler is None:
            return nullcontext()
        from ttr_distill.adapters.diffusers import DiffusersHost

        return DiffusersHost(
            self.teacher.transformer,
            handler,
            cfg_scale=self.guidance,
            cond_or_uncond=(0,) if self.guidance == 1.0 else (0, 1),
            latent_size=(self.rows, self.columns),
        )
