"""Near-far attention."""

from attn_kernels.near_far.api import near_far_attention
from attn_kernels.near_far.selection import select_tiles
from attn_kernels.near_far.tiles import NearFarConfig, NearFarCorrections, near_far_keys

__all__ = ["NearFarConfig", "NearFarCorrections", "near_far_attention", "near_far_keys", "select_tiles"]
