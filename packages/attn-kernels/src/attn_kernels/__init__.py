"""Attention operators for diffusion transformers: exact where it matters, cheap elsewhere."""

from attn_kernels.fidelity import (
    Fidelity,
    WeightFidelity,
    attention_kl,
    cosine_distance,
    fidelity,
    probed_attention,
    relative_l2,
    sampled_attention,
    top_k_overlap,
    weight_fidelity,
)
from attn_kernels.grid import TokenGrid
from attn_kernels.hybrid import Projection, fit_projection, hybrid_attention
from attn_kernels.impl import Impl
from attn_kernels.kernel_regression import HedgehogFeatureMap, MlpFeatureMap, feature_map_attention, kernel_regression
from attn_kernels.landmark import (
    PooledLandmarks,
    landmark_attention,
    pooled_landmark_attention,
    pooled_landmarks,
    strided_landmarks,
)
from attn_kernels.near_far import NearFarConfig, NearFarCorrections, near_far_attention, near_far_keys, select_tiles
from attn_kernels.partial import Partial, merge_partials
from attn_kernels.softmax import softmax_attention
from attn_kernels.taylor import (
    DenominatorProbe,
    TaylorConfig,
    denominator_probe,
    taylor_attention,
    taylor_feature_count,
    taylor_memory,
)
from attn_kernels.window import window_attention, window_attention_2d

__all__ = [
    "DenominatorProbe",
    "Fidelity",
    "HedgehogFeatureMap",
    "Impl",
    "MlpFeatureMap",
    "NearFarConfig",
    "NearFarCorrections",
    "Partial",
    "PooledLandmarks",
    "Projection",
    "TaylorConfig",
    "TokenGrid",
    "WeightFidelity",
    "attention_kl",
    "cosine_distance",
    "denominator_probe",
    "feature_map_attention",
    "fidelity",
    "fit_projection",
    "hybrid_attention",
    "kernel_regression",
    "landmark_attention",
    "merge_partials",
    "near_far_attention",
    "near_far_keys",
    "pooled_landmark_attention",
    "pooled_landmarks",
    "probed_attention",
    "relative_l2",
    "sampled_attention",
    "select_tiles",
    "softmax_attention",
    "strided_landmarks",
    "taylor_attention",
    "taylor_feature_count",
    "taylor_memory",
    "top_k_overlap",
    "weight_fidelity",
    "window_attention",
    "window_attention_2d",
]
