"""One seam for every attention call: route it, guard it, measure it."""

from attn_dispatch.call import (
    AttentionCall,
    AttentionFallback,
    AttentionHandler,
    LayerKey,
    NativeAttention,
    StepContext,
    TokenLayout,
)

__all__ = [
    "AttentionCall",
    "AttentionFallback",
    "AttentionHandler",
    "LayerKey",
    "NativeAttention",
    "StepContext",
    "TokenLayout",
]
