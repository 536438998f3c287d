"""One seam for every attention call: route it, guard it, measure it."""

from attn_dispatch.adapters.sdpa import SdpaMode
from attn_dispatch.call import (
    AttentionCall,
    AttentionFallback,
    AttentionHandler,
    LayerKey,
    NativeAttention,
    StepContext,
    TokenLayout,
)
from attn_dispatch.guards import LayerRange, MinTokens, SigmaBelow
from attn_dispatch.masks import join_mask, split_mask
from attn_dispatch.probe import FidelityProbe, FidelityRow
from attn_dispatch.report import DispatchReport, DispatchRow
from attn_dispatch.router import AttentionRouter, Backend, Guard, NativeHandler, Route, RunObserver

__all__ = [
    "AttentionCall",
    "AttentionFallback",
    "AttentionHandler",
    "AttentionRouter",
    "Backend",
    "DispatchReport",
    "DispatchRow",
    "FidelityProbe",
    "FidelityRow",
    "Guard",
    "LayerKey",
    "LayerRange",
    "MinTokens",
    "NativeAttention",
    "NativeHandler",
    "Route",
    "RunObserver",
    "SdpaMode",
    "SigmaBelow",
    "StepContext",
    "TokenLayout",
    "join_mask",
    "split_mask",
]
