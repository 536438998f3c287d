"""Sinusoidal embedding of scalars such as sigma or the guidance scale."""

import math

import torch
from torch import Tensor, nn


class ScalarSinusoidalEmbedding(nn.Module):
    """Sines and cosines of a scalar at geometrically spaced frequencies from 1 down to 1e-4.

    The positional encoding of Vaswani et al. 2017 (section 3.5) applied to a real number. It has no parameters and
    nothing in the state dict.

    Args:
        embed_dim: Width of the embedding; at least 2, an odd width is rounded up to the next even one.
        input_scale: The scalar is multiplied by it first. At 1, a sigma in [0, 1] moves only the few highest
            frequencies; about 1000 spreads it over all of them.

    Raises:
        ValueError: ``input_scale`` is not a finite number.
    """

    inv_freq: Tensor

    def __init__(self, embed_dim: int, *, input_scale: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(input_scale):
            raise ValueError(f"input_scale must be finite, got {input_scale}")
        width = max(2, int(embed_dim))
        self.embed_dim = width + width % 2
        self.input_scale = input_scale
        half = self.embed_dim // 2
        exponents = torch.arange(half, dtype=torch.float32) / max(1, half - 1)
        self.register_buffer("inv_freq", torch.exp(-math.log(10000.0) * exponents), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embed every element of ``x``.

        Args:
            x: Scalars, any shape; n elements.

        Returns:
            ``[n, embed_dim]`` float32: all sines, then all cosines.
        """
        angles = (x.reshape(-1).float() * self.input_scale)[:, None] * self.inv_freq.float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
