"""Attention through a positive feature map."""

from attn_kernels.kernel_regression.api import feature_map_attention, kernel_regression
from attn_kernels.kernel_regression.feature_map import FeatureMap, HedgehogFeatureMap, MlpFeatureMap

__all__ = ["FeatureMap", "HedgehogFeatureMap", "MlpFeatureMap", "feature_map_attention", "kernel_regression"]
