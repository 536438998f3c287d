"""Attention operators for diffusion transformers: exact where it matters, cheap elsewhere."""

from attn_kernels.fidelity import Fidelity, cosine_distance, fidelity, relative_l2
from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl
from attn_kernels.kernel_regression import kernel_regression
from attn_kernels.landmark import landmark_attention, strided_landmarks
from attn_kernels.near_far import (
    NearFarConfig,
    NearFarCorrections,
    near_far_attention,
    near_far_keys,
    select_tiles,
)
from attn_kernels.partial import Partial, merge_partials
from attn_kernels.softmax import softmax_attention

__all__ = [
    "Fidelity",
    "Impl",
    "NearFarConfig",
    "NearFarCorrections",
    "Partial",
    "TokenGrid",
    "cosine_distance",
    "fidelity",
    "kernel_regression",
    "landmark_attention",
    "merge_partials",
    "near_far_attention",
    "near_far_keys",
    "relative_l2",
    "select_tiles",
    "softmax_attention",
    "strided_landmarks",
]
