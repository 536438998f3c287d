"""Landmark attention: exact softmax over a subset of the keys."""

from attn_kernels.landmark.api import landmark_attention
from attn_kernels.landmark.selection import landmark_budget, strided_landmarks

__all__ = ["landmark_attention", "landmark_budget", "strided_landmarks"]
