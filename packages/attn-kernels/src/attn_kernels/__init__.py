"""Attention operators for diffusion transformers: exact where it matters, cheap elsewhere."""

from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl
from attn_kernels.partial import Partial, merge_partials
from attn_kernels.softmax import softmax_attention

__all__ = [
    "Impl",
    "Partial",
    "TokenGrid",
    "merge_partials",
    "softmax_attention",
]
