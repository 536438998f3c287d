"""Modulates the branches of a student by noise level and guidance scale."""

import math
from typing import NamedTuple

import torch
from attn_dispatch import StepContext
from torch import Tensor, nn

from ttr_distill.embeddings import ScalarSinusoidalEmbedding
from ttr_distill.student.feature_map import seeded_linear


class Modulation(NamedTuple):
    """Four scalars: each branch becomes ``branch * (1 + scale) + bias``."""

    scale_kernel: Tensor
    bias_kernel: Tensor
    scale_landmark: Tensor
    bias_landmark: Tensor


class SigmaCfgConditioner(nn.Module):
    """Two sinusoidal embeddings and a small network; starts as the identity.

    Args:
        embed_dim: Width of each embedding.
        hidden_dim: Width of the hidden layer.
        generator: Draws the initial weights.
    """

    def __init__(self, embed_dim: int = 32, hidden_dim: int = 128, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.sigma_embed = ScalarSinusoidalEmbedding(embed_dim)
        self.cfg_embed = ScalarSinusoidalEmbedding(embed_dim)
        width = self.sigma_embed.embed_dim + self.cfg_embed.embed_dim
        last = seeded_linear(hidden_dim, len(Modulation._fields), generator)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(seeded_linear(width, hidden_dim, generator), nn.SiLU(), last)

    def forward(self, step: StepContext) -> Modulation:
        """Compute the modulation of one diffusion step.

        Args:
            step: ``sigma`` must be finite (host units); a ``cfg_scale`` that is not counts as 1.
        """
        weight = next(self.mlp.parameters())
        cfg_scale = step.cfg_scale if math.isfinite(step.cfg_scale) else 1.0
        # torch.full launches a kernel; torch.tensor would copy from the host and wait for the device.
        sigma, cfg = (torch.full((1,), value, device=weight.device) for value in (step.sigma, cfg_scale))
        embedding = torch.cat([self.sigma_embed(sigma), self.cfg_embed(cfg)], dim=-1)
        scalars: Tensor = self.mlp(embedding.to(weight.dtype))
        return Modulation(*scalars[0].unbind())
