"""Hybrid attention: exact near by, a low-rank Taylor series for all other keys."""

from attn_kernels.hybrid.api import hybrid_attention
from attn_kernels.hybrid.projection import Projection, fit_projection

__all__ = ["Projection", "fit_projection", "hybrid_attention"]
