"""Tells a student the noise level and the guidance scale."""

import math

import torch
from attn_dispatch import StepContext
from torch import Tensor, nn

from ttr_distill.embeddings import ScalarSinusoidalEmbedding
from ttr_distill.student.feature_map import seeded_linear


class SigmaCfgConditioner(nn.Module):
    """Two sinusoidal embeddings and a small network; answers zeros until it is trained.

    Args:
        outputs: How many scalars it answers.
        embed_dim: Width of each embedding.
        hidden_dim: Width of the hidden layer.
        sigma_scale: Sigma is multiplied by it first. At 1 a sigma in [0, 1] moves only a few of the embedding's
            numbers, at 1000 nearly all of them.
        cfg_scale: The guidance scale is multiplied by it first.
        generator: Draws the initial weights.
    """

    def __init__(
        self,
        outputs: int,
        embed_dim: int = 32,
        hidden_dim: int = 128,
        *,
        sigma_scale: float = 1000.0,
        cfg_scale: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sigma_embed = ScalarSinusoidalEmbedding(embed_dim, input_scale=sigma_scale)
        self.cfg_embed = ScalarSinusoidalEmbedding(embed_dim, input_scale=cfg_scale)
        width = self.sigma_embed.embed_dim + self.cfg_embed.embed_dim
        last = seeded_linear(hidden_dim, outputs, generator)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(seeded_linear(width, hidden_dim, generator), nn.SiLU(), last)

    def forward(self, step: StepContext) -> Tensor:
        """Answer for one diffusion step.

        Args:
            step: ``sigma`` must be finite (host units); a ``cfg_scale`` that is not counts as 1.

        Returns:
            ``[outputs]`` in the dtype of the weights.
        """
        weight = next(self.mlp.parameters())
        guidance = step.cfg_scale if math.isfinite(step.cfg_scale) else 1.0
        # torch.full launches a kernel; torch.tensor would copy from the host and wait for the device.
        sigma, cfg = (torch.full((1,), value, device=weight.device) for value in (step.sigma, guidance))
        embedding = torch.cat([self.sigma_embed(sigma), self.cfg_embed(cfg)], dim=-1)
        answer: Tensor = self.mlp(embedding.to(weight.dtype))
        return answer[0]
