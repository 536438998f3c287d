"""The embedded teacher's sampler with steps that can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attn_dispatch.call import AttentionHandler
from torch import Tensor
from ttr_distill.grad import training_mode
from ttr_distill.tiny import TinySampler


class DifferentiableTinySampler(TinySampler):
    """A ``TinySampler`` that is a ``GradientModel`` as well."""

    def gradient_velocity(self, latent: Tensor, step: int, prompts: Sequence[str], handler: AttentionHandler) -> Tensor:
        """Evaluate the guided velocity of one step with graph.

        Args:
            latent: ``[B, N, 16]``.
            step: Number of the step, from 0.
            prompts: B captions.
            handler: Answers every attention; what it adds is differentiated as well.

        Returns:
            ``[B, N, 16]``.
        """
        from ttr_distill.adapters.diffusers import DiffusersHost

        guided = self.guidance != 1.0
        sigma = float(self.sigmas[step])
        with training_mode():
            encoding = self.teacher.encode([*prompts, *([""] * len(prompts))] if guided else prompts)
            host = DiffusersHost(
                self.teacher.transformer,
                handler,
                cfg_scale=self.guidance,
                cond_or_uncond=(0, 1) if guided else (0,),
                latent_size=(self.rows, self.columns),
            )
            with host:
                inputs = torch.cat([latent, latent]) if guided else latent
                answer = self.teacher.velocity(inputs, sigma, encoding, self.rows, self.columns)
        if not guided:
            return answer
        conditional, unconditional = answer.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)
