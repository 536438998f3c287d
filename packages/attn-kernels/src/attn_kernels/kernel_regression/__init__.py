"""Attention through a positive feature map."""

from attn_kernels.kernel_regression.api import kernel_regression

__all__ = ["kernel_regression"]
