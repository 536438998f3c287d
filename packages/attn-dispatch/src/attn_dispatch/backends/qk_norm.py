"""Shrinking queries and keys before their scores are approximated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QkNorm:
    """Makes the norms of queries and keys more equal, so that a series of few terms fits their scores.

    With n the norm of a token in a head: ``normalize`` gives ``x / n`` and ends there; otherwise ``power`` gives
    ``x / n^power``, and ``clip`` then multiplies by ``min(1, clip / n)`` with the n that the token came with.

    Attributes:
        normalize: Give every token norm 1.
        clip: Largest norm; 0 = no limit.
        power: 0 leaves norms as they are, 1 makes them equal.
        sigma_max: Only at noise levels up to this, in the host's units; 0 = at all, also at unknown ones.
        eps: Added to norms.
    """

    normalize: bool = False
    clip: float = 0.0
    power: float = 0.0
    sigma_max: float = 0.0
    eps: float = 1e-6

    def active(self, sigma: float | None) -> bool:
        """Whether queries and keys are changed at this noise level; ``None`` = unknown."""
        return (self.normalize or self.clip > 0 or self.power > 0) and self.open_at(sigma)

    def open_at(self, sigma: float | None) -> bool:
        """Whether ``sigma_max`` allows a change at this noise level; ``None`` = unknown."""
        return self.sigma_max <= 0 or (sigma is not None and sigma <= self.sigma_max)

    def apply(self, x: Tensor) -> Tensor:
        """Change the norms of tokens, whatever the noise level.

        Args:
            x: ``[B, H, N, D]``.

        Returns:
            ``[B, H, N, D]`` in the dtype of ``x``, computed in float32 or wider.
        """
        if not (self.normalize or self.clip > 0 or self.power > 0):
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + self.eps
        if self.normalize:
            return (wide / norm).to(x.dtype)
        factor = torch.ones_like(norm)
        if self.power > 0:
            factor = norm.pow(-self.power)
        if self.clip > 0:
            factor = factor * (self.clip / norm).clamp(max=1.0)
        return (wide * factor).to(x.dtype)
