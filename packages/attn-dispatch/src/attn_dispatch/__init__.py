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
from attn_dispatch.default import (
    attention_backend,
    auto_detect_precision,
    auto_select,
    dispatch_attention,
    dispatch_attention_varlen,
    explain,
    get_backend,
    get_backend_label,
    set_backend,
)
from attn_dispatch.finite import FiniteBackend
from attn_dispatch.guards import LayerRange, MinTokens, PaysOff, SigmaBelow
from attn_dispatch.masks import join_mask, split_mask
from attn_dispatch.probe import FidelityProbe, FidelityRow
from attn_dispatch.report import DispatchReport, DispatchRow
from attn_dispatch.router import AttentionRouter, Backend, Guard, NativeHandler, Route, RunObserver, StepObserver

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
    "FiniteBackend",
    "Guard",
    "LayerKey",
    "LayerRange",
    "MinTokens",
    "NativeAttention",
    "NativeHandler",
    "PaysOff",
    "Route",
    "RunObserver",
    "SdpaMode",
    "SigmaBelow",
    "StepContext",
    "StepObserver",
    "TokenLayout",
    "attention_backend",
    "auto_detect_precision",
    "auto_select",
    "dispatch_attention",
    "dispatch_attention_varlen",
    "explain",
    "get_backend",
    "get_backend_label",
    "join_mask",
    "set_backend",
    "split_mask",
]
