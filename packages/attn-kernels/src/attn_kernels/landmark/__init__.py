"""Landmark attention: exact softmax over a subset of the keys, or over keys that stand for tiles."""

from attn_kernels.landmark.api import landmark_attention, pooled_landmark_attention
from attn_kernels.landmark.pooled import PooledLandmarks, pooled_landmarks
from attn_kernels.landmark.selection import landmark_budget, strided_landmarks

__all__ = [
    "PooledLandmarks",
    "landmark_attention",
    "landmark_budget",
    "pooled_landmark_attention",
    "pooled_landmarks",
    "strided_landmarks",
]
