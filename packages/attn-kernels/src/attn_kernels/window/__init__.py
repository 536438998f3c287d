"""Exact attention to the tokens near by."""

from attn_kernels.window.api import window_attention, window_attention_2d
from attn_kernels.window.spans import WindowBlock, window_blocks, window_blocks_2d, window_mask, window_mask_2d

__all__ = [
    "WindowBlock",
    "window_attention",
    "window_attention_2d",
    "window_blocks",
    "window_blocks_2d",
    "window_mask",
    "window_mask_2d",
]
